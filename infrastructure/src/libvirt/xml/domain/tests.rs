use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ghost_domain::vm::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    VmSpec,
};
use ghost_domain::{
    ByteSize, ImageDigest, ImageFormat, ImageName, MacAddress, NetworkName, Timestamp, VmName,
};
use proptest::prelude::*;

use super::super::tree::is_xml_char;
use super::*;

fn definition() -> DomainDefinition {
    let id: VmId = "5b1a2f46-7c0e-4b52-9d57-3f2f6a1c0d11".parse().unwrap();
    DomainDefinition {
        vm: Vm {
            id,
            name: VmName::new("web").unwrap(),
            generation: 3,
            spec: VmSpec {
                vcpus: 2,
                memory: ByteSize::from_mib(512),
                image: ImageReference {
                    name: ImageName::new("tiny").unwrap(),
                    content: Some((ImageDigest::from_bytes([7; 32]), ImageFormat::Qcow2)),
                },
                disk: ByteSize::from_gib(1),
                interfaces: vec![NetworkInterface {
                    network: NetworkName::new("default").unwrap(),
                    mac: "52:54:00:12:34:56".parse().unwrap(),
                }],
                autostart: Some(Autostart {
                    order: -2,
                    delay: Duration::from_secs(5),
                }),
                restart_policy: RestartPolicy::default(),
                delete_protection: true,
                guest: Default::default(),
                tags: BTreeMap::from([("team".to_owned(), "a <b> & \"c\"".to_owned())]),
            },
            cloud_init: CloudInit {
                user_data: Some("#!/bin/sh\necho secret".into()),
                ..CloudInit::default()
            },
            desired: DesiredPower::Running,
            lifecycle: Lifecycle::Creating,
            created_at: Timestamp::from_unix_millis(1_700_000_000_123),
            registered_addresses: Vec::new(),
            crash_restarts: vec![Timestamp::default()],
            owner: None,
        },
        disk: "/var/lib/ghost/vms/x/disk.qcow2".into(),
        seed: "/var/lib/ghost/vms/x/seed.img".into(),
        console_socket: "/var/lib/ghost/vms/x/console.sock".into(),
        guest_socket: "/var/lib/ghost/vms/x/guest.sock".into(),
        console_log: "/var/lib/ghost/vms/x/console.log".into(),
        libvirt_networks: vec!["ghost-default".into()],
        base_image: ("/var/lib/ghost/images/base".into(), ImageFormat::Raw),
    }
}

fn qemu() -> DomainProfile {
    DomainProfile::qemu(
        Accelerator::Tcg,
        Some("/usr/bin/qemu-system-x86_64".to_owned()),
    )
}

fn rendered(definition: &DomainDefinition) -> Element {
    domain_xml(definition, &qemu()).unwrap()
}

fn disk_of(root: &Element) -> Option<PathBuf> {
    root.at(&["devices", "disk", "source"])?
        .attribute("file")
        .map(PathBuf::from)
}

/// The record as metadata can hold it.
fn rebuilt(vm: &Vm) -> Vm {
    Vm {
        cloud_init: CloudInit::default(),
        lifecycle: Lifecycle::Ready,
        registered_addresses: Vec::new(),
        crash_restarts: Vec::new(),
        owner: None,
        ..vm.clone()
    }
}

#[test]
fn a_domain_belongs_to_the_agent_whose_folder_it_lies_in() {
    let xml = rendered(&definition()).to_xml().unwrap();
    let belongs = |xml: &str, folder: &str| parse_domain(xml).unwrap().lies_in(Path::new(folder));
    assert!(belongs(&xml, "/var/lib/ghost"));
    assert!(!belongs(&xml, "/var/lib/ghost-other"));
    assert!(!belongs(&xml, "/var/lib/gho"));
    // Damaged metadata or another disk do not make it a stranger.
    let damaged = xml.replace("generation=", "degeneration=");
    assert!(parse_domain(&damaged).unwrap().record.is_none());
    assert!(belongs(&damaged, "/var/lib/ghost"));
}

#[test]
fn the_document_is_what_we_mean() {
    insta::assert_snapshot!(rendered(&definition()).to_xml().unwrap());
}

#[test]
fn kvm_passes_the_host_cpu_through() {
    let profile = DomainProfile::qemu(Accelerator::Kvm, None);
    let root = domain_xml(&definition(), &profile).unwrap();
    assert_eq!(root.attribute("type"), Some("kvm"));
    assert_eq!(
        root.find("cpu").unwrap().attribute("mode"),
        Some("host-passthrough")
    );
    assert!(root.at(&["devices", "emulator"]).is_none());
}

#[test]
fn every_disk_has_an_explicit_format_and_a_closed_chain() {
    let root = rendered(&definition());
    for disk in root.find("devices").unwrap().all("disk") {
        assert!(disk.find("driver").unwrap().attribute("type").is_some());
        let mut store = disk.find("backingStore").expect("a chain");
        while let Some(next) = store.find("backingStore") {
            assert!(store.find("format").unwrap().attribute("type").is_some());
            store = next;
        }
        assert!(store.children.is_empty() && store.attributes.is_empty());
    }
}

#[test]
fn only_the_shared_image_keeps_its_owner() {
    let root = rendered(&definition());
    let mut kept = Vec::new();
    for disk in root.find("devices").unwrap().all("disk") {
        let mut layer = disk;
        while let Some(source) = layer.find("source") {
            if let Some(label) = source.find("seclabel") {
                assert_eq!(label.attribute("model"), Some("dac"));
                assert_eq!(label.attribute("relabel"), Some("no"));
                kept.push(source.attribute("file").unwrap());
            }
            layer = layer.find("backingStore").expect("a closed chain");
        }
    }
    assert_eq!(kept, [definition().base_image.0.to_str().unwrap()]);
}

#[test]
fn nothing_of_cloud_init_is_in_the_document() {
    let xml = rendered(&definition()).to_xml().unwrap();
    assert!(!xml.contains("secret") && !xml.contains("user_data"));
}

#[test]
fn the_record_comes_back_and_nothing_drifts() {
    let definition = definition();
    let parsed = parse_domain(&rendered(&definition).to_xml().unwrap()).unwrap();
    assert!(parsed.ours);
    assert_eq!(parsed.record, Some(rebuilt(&definition.vm)));
    assert_eq!(parsed.drift, Vec::<String>::new());
}

#[test]
fn edits_are_named() {
    let xml = rendered(&definition()).to_xml().unwrap();
    for (from, to, line) in [
        (
            "<vcpu placement=\"static\">2<",
            "<vcpu placement=\"static\" current=\"1\">4<",
            "vcpus: libvirt has 4, the record has 2",
        ),
        (
            "<memory unit=\"bytes\">536870912<",
            "<memory unit=\"MiB\">1024<",
            "memory: libvirt has 1048576 KiB, the record has 524288 KiB",
        ),
        (
            "<source file=\"/var/lib/ghost/vms/x/disk.qcow2\"/>",
            "<source file=\"/etc/shadow\"/>",
            "disk: libvirt has /etc/shadow, the record has /var/lib/ghost/vms/x/disk.qcow2",
        ),
        (
            "<mac address=\"52:54:00:12:34:56\"/>",
            "<mac address=\"52:54:00:00:00:01\"/>",
            "nic 0 mac: libvirt has 52:54:00:00:00:01, the record has 52:54:00:12:34:56",
        ),
        (
            "<source network=\"ghost-default\"/>",
            "<source bridge=\"br0\"/>",
            "nic 0 network: libvirt has none, the record has ghost-default",
        ),
        (
            "<name>web<",
            "<name>renamed<",
            "name: libvirt has renamed, the record has web",
        ),
    ] {
        assert!(xml.contains(from), "{from}");
        let parsed = parse_domain(&xml.replace(from, to)).unwrap();
        assert_eq!(parsed.drift, [line.to_owned()]);
        assert!(parsed.record.is_some());
    }
}

#[test]
fn foreign_copied_and_damaged_domains_are_told_apart() {
    let xml = rendered(&definition()).to_xml().unwrap();
    let foreign = "<domain type='kvm'><name>a</name><uuid>5b1a2f46-7c0e-4b52-9d57-3f2f6a1c0d12</uuid></domain>";
    assert!(!parse_domain(foreign).unwrap().ours);
    let copied = xml.replace(
        "<uuid>5b1a2f46-7c0e-4b52-9d57-3f2f6a1c0d11<",
        "<uuid>5b1a2f46-7c0e-4b52-9d57-3f2f6a1c0d12<",
    );
    assert!(!parse_domain(&copied).unwrap().ours);
    for (from, to) in [
        ("generation=\"3\"", "generation=\"many\""),
        (" vcpus=\"2\"", ""),
        ("policy=\"on-crash\"", "policy=\"sometimes\""),
        ("sha256=\"07", "sha256=\"zz"),
    ] {
        assert!(xml.contains(from), "{from}");
        let parsed = parse_domain(&xml.replace(from, to)).unwrap();
        assert!(parsed.ours && parsed.record.is_none());
        assert_eq!(parsed.drift.len(), 1);
    }
    assert!(parse_domain("<network/>").is_err());
    assert!(parse_domain("<domain/>").is_err());
}

#[test]
fn a_path_that_xml_cannot_carry_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let mut broken = definition();
    broken.disk = PathBuf::from(std::ffi::OsStr::from_bytes(b"/x\xff"));
    let error = domain_xml(&broken, &qemu()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    broken.disk = "/x\ny".into();
    let error = domain_xml(&broken, &qemu()).unwrap().to_xml().unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
}

prop_compose! {
    fn a_spec()(
        vcpus in 1u32..=255,
        memory in 1u64..=1 << 44,
        disk in 1u64..=1 << 46,
        interfaces in proptest::collection::vec(("[a-z0-9][a-z0-9-]{0,20}", any::<[u8; 3]>()), 0..4),
        tags in proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4),
        autostart in proptest::option::of((any::<i32>(), 0u64..1 << 40)),
        restart in proptest::option::of((any::<u32>(), 0u64..1 << 40)),
        delete_protection in any::<bool>(),
        image in "[a-z0-9][a-z0-9._-]{0,20}",
        content in proptest::option::of((any::<[u8; 32]>(), any::<bool>())),
    ) -> VmSpec {
        VmSpec {
            vcpus,
            memory: ByteSize::from_bytes(memory),
            image: ImageReference {
                name: ImageName::new(image).unwrap(),
                content: content.map(|(digest, raw)| (
                    ImageDigest::from_bytes(digest),
                    if raw { ImageFormat::Raw } else { ImageFormat::Qcow2 },
                )),
            },
            disk: ByteSize::from_bytes(disk),
            interfaces: interfaces.into_iter().map(|(network, [a, b, c])| NetworkInterface {
                network: NetworkName::new(network).unwrap(),
                mac: format!("52:54:00:{a:02x}:{b:02x}:{c:02x}").parse::<MacAddress>().unwrap(),
            }).collect(),
            autostart: autostart.map(|(order, delay)| Autostart { order, delay: Duration::from_millis(delay) }),
            restart_policy: restart.map_or(RestartPolicy::Never, |(max_restarts, window)| RestartPolicy::OnCrash {
                max_restarts,
                window: Duration::from_millis(window),
            }),
            delete_protection,
            guest: Default::default(),
            tags,
        }
    }
}

/// Strings that try to break out, besides arbitrary ones.
fn hostile() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        Just("</name><devices><disk type='file'>".to_owned()),
        Just("x'/><source file='/etc/shadow'/><a b='".to_owned()),
        Just("x\"/><!-- ".to_owned()),
        Just("&lt;&#60;&x;]]>".to_owned()),
        Just("<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/shadow'>]>".to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// T5: whatever the strings are, the document that libvirt parses is the one we meant.
    #[test]
    fn no_string_changes_the_structure(
        spec in a_spec(),
        name in "[a-z0-9][a-z0-9-]{0,62}",
        network in hostile(),
        file in hostile(),
        socket in hostile(),
        generation in any::<u64>(),
        created in any::<i64>(),
    ) {
        let mut definition = definition();
        definition.vm.name = VmName::new(name).unwrap();
        definition.vm.generation = generation;
        definition.vm.created_at = Timestamp::from_unix_millis(created);
        definition.vm.spec = spec;
        definition.libvirt_networks = vec![network.clone(); definition.vm.spec.interfaces.len()];
        definition.disk = PathBuf::from(format!("/d/{file}"));
        definition.console_socket = PathBuf::from(format!("/s/{socket}"));
        let root = rendered(&definition);

        let mut strings = format!("{file}{socket}");
        if !definition.vm.spec.interfaces.is_empty() {
            strings.push_str(&network);
        }
        let xml = match root.to_xml() {
            Ok(xml) => xml,
            Err(error) => {
                prop_assert_eq!(error.code(), ErrorCode::InvalidArgument);
                prop_assert!(!strings.chars().all(is_xml_char));
                return Ok(());
            }
        };
        let parsed = Element::parse(&xml).unwrap();
        let optional = usize::from(definition.vm.spec.autostart.is_some())
            + definition.vm.spec.tags.len()
            + definition.vm.spec.interfaces.len() * 5;
        prop_assert_eq!(parsed.count(), FIXED_ELEMENTS + optional);
        prop_assert_eq!(&parsed, &root);
        prop_assert_eq!(disk_of(&parsed).unwrap(), definition.disk.clone());

        let seen = parse_domain(&xml).unwrap();
        prop_assert_eq!(seen.record, Some(rebuilt(&definition.vm)));
        prop_assert_eq!(seen.drift, Vec::<String>::new());
    }

    /// An edited document never makes us panic.
    #[test]
    fn damage_is_survived(at in 0usize..5000, with in "[<>&'\"a-z0-9 /=]{0,6}") {
        let xml = rendered(&definition()).to_xml().unwrap();
        let at = at % xml.len();
        prop_assume!(xml.is_char_boundary(at));
        let mut damaged = xml.clone();
        damaged.replace_range(at..(at + with.len()).min(xml.len()), &with);
        let _ = parse_domain(&damaged);
    }
}

/// Elements of a domain without interfaces, tags and autostart.
const FIXED_ELEMENTS: usize = 63;
