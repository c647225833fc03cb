use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::samples;
use super::*;

#[test]
fn every_record_reads_back_as_it_was_written() {
    for (key, record) in samples::all() {
        let bytes = encode(&record).unwrap();
        assert_eq!(super::key(&name(&key)).unwrap(), key);
        assert_eq!(decode(&key, &bytes).unwrap(), record, "{key:?}");
    }
}

#[test]
fn the_samples_have_one_of_each_kind() {
    let kinds: std::collections::BTreeSet<String> = samples::all()
        .iter()
        .map(|(key, _)| name(key).split('/').next().unwrap().to_owned())
        .collect();
    let expected = [
        "authority",
        "command",
        "core",
        "epoch",
        "host",
        "inventory",
        "key",
        "known",
        "name",
        "owner",
        "replica",
        "room",
        "sent",
        "tenant",
        "token",
        "user",
    ];
    assert!(kinds.iter().eq(expected), "{kinds:?}");
}

#[test]
fn a_host_with_hundreds_of_vms_fits_into_one_record() {
    let bytes = encode(&Record::Inventory(Box::new(samples::inventory(600)))).unwrap();
    assert_eq!(bytes[0], DEFLATED);
    assert!(bytes.len() < 60_000, "{} bytes", bytes.len());
}

#[test]
fn what_a_newer_version_wrote_is_refused_and_not_half_read() {
    #[derive(Serialize)]
    struct Newer {
        name: String,
        address: String,
        since: i64,
        colour: String,
    }
    let newer = Newer {
        name: "one".into(),
        address: "core:7443".into(),
        since: 1,
        colour: "blue".into(),
    };
    let key = RecordKey::Replica("one".into());
    let error = decode(&key, &pack(&newer).unwrap()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    assert!(error.cause().unwrap().contains("colour"), "{error}");
    let mut other_format = pack(&7u64).unwrap();
    other_format[0] = 9;
    assert!(decode(&RecordKey::Epoch, &other_format).is_err());
}

#[test]
fn no_unknown_name_becomes_a_key() {
    for text in [
        "",
        "host",
        "host/x",
        "name/acme",
        "name/-/x",
        "epoch/1",
        "future/1",
        "/",
    ] {
        assert!(super::key(text).is_err(), "{text:?}");
    }
}

#[test]
fn a_bomb_does_not_fill_the_memory() {
    let mut encoder = DeflateEncoder::new(vec![DEFLATED], Compression::best());
    encoder.write_all(&vec![0; 32 << 20]).unwrap();
    let bomb = encoder.finish().unwrap();
    assert!(unpack::<BTreeMap<String, String>>(&bomb).is_err());
}

proptest! {
    #[test]
    fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), at: proptest::sample::Index) {
        let keys = samples::all();
        let (key, _) = at.get(&keys);
        let _ = decode(key, &bytes);
    }

    #[test]
    fn a_flipped_byte_never_panics(at: proptest::sample::Index, which: proptest::sample::Index, flip in 1u8..) {
        let all = samples::all();
        let (key, record) = which.get(&all);
        let mut bytes = encode(record).unwrap();
        *at.get_mut(&mut bytes) ^= flip;
        let _ = decode(key, &bytes);
    }
}
