//! Hostile and mistaken images (threats T1 to T3): every one is refused with a stable code, a
//! sentence and a hint, leaves nothing behind, and never brings a byte of a host file out.

use std::path::Path;

use ghost_domain::ErrorCode::{ImageTooLarge, UnsafeImage, UnsupportedImage};
use ghost_domain::ports::ImageCache;
use ghost_domain::{ByteSize, ErrorCode};

use super::support::*;

/// What stands in the file that the images try to reach.
const CANARY: &str = "canary-5f0e1c7a-do-not-leak";

struct Corpus {
    images: Vec<(String, Vec<u8>, ErrorCode)>,
    folder: tempfile::TempDir,
    good: Vec<u8>,
}

fn be32(image: &mut [u8], at: usize, value: u32) {
    image[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn be64(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

impl Corpus {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("canary"), CANARY.repeat(4096)).unwrap();
        Self {
            images: Vec::new(),
            folder,
            good: qcow2_disk(8, &[]),
        }
    }

    fn canary(&self) -> String {
        self.folder
            .path()
            .join("canary")
            .to_str()
            .unwrap()
            .to_owned()
    }

    fn add(&mut self, name: &str, image: impl Into<Vec<u8>>, code: ErrorCode) {
        self.images.push((name.to_owned(), image.into(), code));
    }

    /// The good image with bytes changed.
    fn patched(&mut self, name: &str, code: ErrorCode, patch: impl FnOnce(&mut Vec<u8>)) {
        let mut image = self.good.clone();
        patch(&mut image);
        self.add(name, image, code);
    }

    /// The good image with a backing file name written into its header.
    fn backing(&mut self, name: &str, target: &str) {
        self.patched(&format!("backing file: {name}"), UnsafeImage, |image| {
            let at = 0x400;
            image[at..at + target.len()].copy_from_slice(target.as_bytes());
            be64(image, 8, at as u64);
            be32(image, 16, u32::try_from(target.len()).unwrap());
        });
    }

    /// A header extension before the others.
    fn extension(&mut self, name: &str, kind: u32, data: &[u8], code: ErrorCode) {
        self.patched(name, code, |image| {
            let start =
                usize::try_from(u32::from_be_bytes(image[100..104].try_into().unwrap())).unwrap();
            be32(image, start, kind);
            be32(image, start + 4, u32::try_from(data.len()).unwrap());
            let end = start + 8 + data.len().next_multiple_of(8);
            image[start + 8..end].fill(0);
            image[start + 8..start + 8 + data.len()].copy_from_slice(data);
            image[end..end + 8].fill(0);
        });
    }

    /// An image made by `qemu-img create`.
    fn made(&mut self, name: &str, arguments: &[&str], code: ErrorCode) {
        let path = self.folder.path().join("made");
        let mut all = vec!["create", "-q"];
        all.extend_from_slice(arguments);
        all.extend([path.to_str().unwrap(), "8M"]);
        qemu_img(&all);
        let image = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        self.add(name, image, code);
    }

    fn outside_references(&mut self) {
        let canary = self.canary();
        self.backing("a file of the host", &canary);
        self.backing("relative", "../../../../etc/passwd");
        self.backing("json", &format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{canary}\"}}}}"));
        self.backing("nbd", "nbd://127.0.0.1:10809/x");
        self.backing("nbd+unix", "nbd+unix:///x?socket=/run/libvirt/libvirt-sock");
        self.backing("ssh", "ssh://root@127.0.0.1/etc/shadow");
        self.backing("http", "http://169.254.169.254/latest/meta-data");
        self.backing("fat", "fat:/etc");
        self.backing("host device", "/dev/sda");
        self.backing("fd", "/dev/fdset/1");
        self.backing("itself", "self");
        self.backing("empty", "");
        self.backing("terminal escapes", "\x1b[2J\u{7}evil");
        self.made(
            "backing file by QEMU",
            &["-f", "qcow2", "-u", "-F", "raw", "-b", "/etc/passwd"],
            UnsafeImage,
        );
        self.made(
            "backing chain by QEMU",
            &["-f", "qcow2", "-u", "-F", "qcow2", "-b", "other.qcow2"],
            UnsafeImage,
        );
        let data_file = self.folder.path().join("data");
        let option = format!("data_file={},data_file_raw=on", data_file.display());
        self.made(
            "external data file by QEMU",
            &["-f", "qcow2", "-o", &option],
            UnsafeImage,
        );
        self.patched("external data file bit alone", UnsafeImage, |image| {
            image[79] |= 4
        });
        self.extension(
            "external data file name alone",
            0x4441_5441,
            canary.as_bytes(),
            UnsafeImage,
        );
        self.extension("backing format alone", 0xe279_2aca, b"raw", UnsafeImage);
    }

    fn broken_headers(&mut self) {
        for (name, at, value) in [
            ("version 1", 4, 1),
            ("version 0", 4, 0),
            ("version 4", 4, 4),
            ("cluster bits 0", 20, 0),
            ("cluster bits 8", 20, 8),
            ("cluster bits 22", 20, 22),
            ("cluster bits 2^31", 20, 1 << 31),
            ("AES", 32, 1),
            ("LUKS inside", 32, 2),
            ("unknown encryption", 32, 7),
            ("huge L1", 36, u32::MAX),
            ("L1 too small", 36, 0),
            ("huge refcount table", 56, u32::MAX),
            ("no refcount table", 56, 0),
            ("refcount order 7", 96, 7),
            ("header length 0", 100, 0),
            ("header length 103", 100, 103),
            ("header length 2^32-1", 100, u32::MAX),
        ] {
            self.patched(name, UnsupportedImage, |image| be32(image, at, value));
        }
        for (name, at, value) in [
            ("unknown feature bit 5", 72, 1 << 5),
            ("unknown feature bit 63", 72, 1 << 63),
            ("corrupt", 72, 2),
            ("compression bit without a type", 72, 8),
            ("L1 beyond the end", 40, 1 << 40),
            ("L1 near 2^64", 40, u64::MAX - 0xffff),
            ("L1 not aligned", 40, 12345),
            ("refcounts beyond the end", 48, 1 << 40),
            ("refcounts at zero", 48, 0),
            ("no size", 24, 0),
            ("backing name beyond the cluster", 8, 1 << 30),
            ("backing name near 2^64", 8, u64::MAX),
            ("backing name inside the header", 8, 8),
        ] {
            self.patched(name, UnsupportedImage, |image| {
                be64(image, at, value);
                be32(image, 16, if at == 8 { 16 } else { 0 });
            });
        }
        self.patched("backing name too long", UnsupportedImage, |image| {
            be64(image, 8, 0x200);
            be32(image, 16, 4096);
        });
        self.patched("unknown compression", UnsupportedImage, |image| {
            be64(image, 72, 8);
            be32(image, 100, 112);
            image[104] = 9;
        });
        self.patched(
            "compression type without its bit",
            UnsupportedImage,
            |image| image[104] = 1,
        );
        self.extension("encryption header", 0x0537_be77, &[0; 16], UnsupportedImage);
        self.patched("an extension of 4 GiB", UnsupportedImage, |image| {
            let start =
                usize::try_from(u32::from_be_bytes(image[100..104].try_into().unwrap())).unwrap();
            be32(image, start, 0x1234_5678);
            be32(image, start + 4, u32::MAX);
        });
        let half = self.good[..self.good.len() / 2].to_vec();
        self.add("cut in half", half, UnsupportedImage);
        for length in [4, 20, 71, 103, 512] {
            let cut = self.good[..length].to_vec();
            self.add(&format!("cut to {length} bytes"), cut, UnsupportedImage);
        }
        self.patched("garbage in the refcounts", UnsupportedImage, |image| {
            let table =
                usize::try_from(u64::from_be_bytes(image[48..56].try_into().unwrap())).unwrap();
            image[table..table + 8].fill(0xee);
        });
        self.patched("an L1 that points at itself", UnsupportedImage, |image| {
            let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap());
            be64(image, usize::try_from(l1).unwrap(), l1 | 1 << 63);
        });
        self.patched("data beyond the end", UnsupportedImage, |image| {
            let l1 =
                usize::try_from(u64::from_be_bytes(image[40..48].try_into().unwrap())).unwrap();
            be64(image, l1, (1 << 45) | 1 << 63);
        });
    }

    fn absurd_sizes(&mut self) {
        self.made("3 TiB in 200 KiB", &["-f", "qcow2"], ImageTooLarge);
        let (_, image, _) = self.images.last_mut().unwrap();
        *image = {
            let path = self.folder.path().join("large");
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "3T"]);
            std::fs::read(&path).unwrap()
        };
        self.patched("2^63 bytes", UnsupportedImage, |image| {
            be64(image, 24, 1 << 63)
        });
        self.patched("2^64-1 bytes", UnsupportedImage, |image| {
            be64(image, 24, u64::MAX)
        });
    }

    fn other_formats(&mut self) {
        for format in ["vmdk", "vdi", "vpc", "vhdx", "qed", "parallels", "qcow"] {
            self.made(
                &format!("{format} by QEMU"),
                &["-f", format],
                UnsupportedImage,
            );
        }
        self.made(
            "fixed VHD by QEMU",
            &["-f", "vpc", "-o", "subformat=fixed"],
            UnsupportedImage,
        );
        let descriptor = format!(
            "# Disk DescriptorFile\nversion=1\nCID=0\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"{}\" 0\n",
            self.canary()
        );
        self.add(
            "VMDK descriptor with a host file",
            descriptor.clone(),
            UnsupportedImage,
        );
        let mut padded = descriptor.into_bytes();
        padded.resize(4096, b'\n');
        padded[510] = 0x55;
        padded[511] = 0xaa;
        self.add(
            "VMDK descriptor with a boot signature",
            padded,
            UnsupportedImage,
        );

        let at = |offset: usize, magic: &[u8]| {
            // With a boot signature, so that nothing but the magic tells it.
            let mut bytes = raw_disk(1);
            bytes[offset..offset + magic.len()].copy_from_slice(magic);
            bytes
        };
        for (name, offset, magic) in [
            ("VMware COWD", 0, &b"COWD"[..]),
            ("LUKS", 0, b"LUKS\xba\xbe\0\x02"),
            ("ISO", 0x8001, b"CD001"),
            ("UDF", 0x8001, b"BEA01"),
            ("squashfs", 0, b"hsqs"),
            ("tar", 257, b"ustar"),
            ("zip", 0, b"PK\x03\x04"),
            ("7z", 0, b"7z\xbc\xaf\x27\x1c"),
            ("rar", 0, b"Rar!\x1a\x07"),
            ("bzip2", 0, b"BZh9"),
            ("lz4", 0, b"\x04\x22\x4d\x18"),
            ("WIM", 0, b"MSWIM\0\0\0"),
            ("ELF", 0, b"\x7fELF"),
            ("Linux kernel", 0x202, b"HdrS"),
            ("cpio", 0, b"070701"),
            ("deb", 0, b"!<arch>\n"),
            ("bochs", 0, b"Bochs Virtual HD Image"),
        ] {
            self.add(name, at(offset, magic), UnsupportedImage);
        }
        for (name, text) in [
            (
                "web page",
                "<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
            ),
            ("web page after blanks", "\n\n  <html>\n"),
            (
                "JSON",
                "{\"driver\":\"raw\",\"file\":{\"filename\":\"/etc/passwd\"}}",
            ),
            ("XML", "<?xml version=\"1.0\"?><Error>AccessDenied</Error>"),
            ("text", "just a text file\n"),
            ("passwd", "root:x:0:0:root:/root:/bin/bash\n"),
        ] {
            self.add(name, text.as_bytes(), UnsupportedImage);
        }
        let mut trailer = raw_disk(1);
        let end = trailer.len();
        trailer[end - 512..end - 504].copy_from_slice(b"conectix");
        self.add("raw disk with a VHD footer", trailer, UnsupportedImage);
    }

    fn no_disks(&mut self) {
        self.add("empty", [], UnsupportedImage);
        self.add("one byte", [0], UnsupportedImage);
        self.add("zeros", vec![0; 1 << 20], UnsupportedImage);
        self.add(
            "noise",
            raw_disk(1)[4096..200_000].to_vec(),
            UnsupportedImage,
        );
        let mut file_system = vec![0; 1 << 20];
        file_system[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        self.add("a bare ext4 file system", file_system, UnsupportedImage);
        let mut odd = raw_disk(1);
        odd.truncate(1_000_001);
        self.add("a raw disk of odd length", odd, UnsupportedImage);
        self.add("compressed text", gzip(b"hello"), UnsupportedImage);
        self.add("an empty gzip", gzip(b""), UnsupportedImage);
        self.add("gzip in xz", xz(&gzip(&raw_disk(1))), UnsupportedImage);
        let hostile = self.images[0].1.clone();
        self.add("a hostile image, compressed", zstd(&hostile), UnsafeImage);
        self.add("a gzip magic alone", b"\x1f\x8b".to_vec(), UnsupportedImage);
        self.add(
            "an xz magic alone",
            b"\xfd7zXZ\0".to_vec(),
            UnsupportedImage,
        );
        self.add(
            "a zstd magic alone",
            b"\x28\xb5\x2f\xfd".to_vec(),
            UnsupportedImage,
        );
    }
}

fn holds(folder: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, needle);
        }
        let bytes = std::fs::read(&path).unwrap();
        bytes.windows(needle.len()).any(|window| window == needle)
    })
}

#[tokio::test]
async fn every_hostile_image_is_refused_and_leaves_nothing() {
    let mut corpus = Corpus::new();
    corpus.outside_references();
    corpus.broken_headers();
    corpus.absurd_sizes();
    corpus.other_formats();
    corpus.no_disks();
    assert!(corpus.images.len() >= 100, "{} images", corpus.images.len());
    let fixture = Fixture::new();
    let mut wrong = Vec::new();
    for (name, image, code) in &corpus.images {
        match fixture.import(image).await {
            Ok(content) => wrong.push(format!("{name}: taken as {:?}", content.format)),
            Err(error) => {
                let told = format!("{error} {}", error.hint_text().unwrap_or_default());
                if error.code() != *code {
                    wrong.push(format!(
                        "{name}: {} instead of {code}: {told}",
                        error.code()
                    ));
                }
                if error.hint_text().is_none() && error.cause().is_none() {
                    wrong.push(format!("{name}: no word on what to do: {told}"));
                }
                if told.contains(CANARY) || told.chars().any(char::is_control) {
                    wrong.push(format!("{name}: leaks: {told:?}"));
                }
            }
        }
        let left = fixture.staged();
        if !left.is_empty() {
            wrong.push(format!("{name}: leaves {left:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(fixture.published(), Vec::<String>::new());
    assert!(!holds(fixture.folder.path(), CANARY.as_bytes()));
    assert_eq!(
        std::fs::read_to_string(corpus.canary()).unwrap(),
        CANARY.repeat(4096)
    );
}

/// A guest may write a qcow2 header with a backing file onto its raw disk (threat T2). Such bytes
/// on a disk that we know as raw stay bytes.
#[tokio::test]
async fn a_qcow2_header_at_the_start_of_a_disk_is_never_taken_for_raw() {
    let mut corpus = Corpus::new();
    let canary = corpus.canary();
    corpus.backing("on a raw disk", &canary);
    let (_, image, _) = &corpus.images[0];
    let mut disk = raw_disk(1);
    disk[..2048].copy_from_slice(&image[..2048]);
    disk[510] = 0x55;
    disk[511] = 0xaa;
    let fixture = Fixture::new();
    assert_eq!(fixture.import(&disk).await.unwrap_err().code(), UnsafeImage);
}

#[tokio::test]
async fn the_largest_virtual_size_is_an_option() {
    let fixture = Fixture::with(|options| options.max_virtual_size = ByteSize::from_mib(8));
    fixture.import(&raw_disk(8)).await.unwrap();
    fixture.import(&qcow2_disk(8, &[])).await.unwrap();
    for image in [raw_disk(9), qcow2_disk(9, &[])] {
        let error = fixture.import(&image).await.unwrap_err();
        assert_eq!(error.code(), ImageTooLarge);
        assert!(
            error.message().contains("9 MiB") && error.message().contains("8 MiB"),
            "{error}"
        );
    }
    assert_eq!(fixture.cache.list().await.unwrap().len(), 2);
}
