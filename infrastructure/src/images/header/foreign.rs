//! Tells what a file is that is not a disk image we take, so that the refusal can say it.

/// What a file is, and what to do about it.
pub(super) struct Foreign {
    pub(super) what: &'static str,
    pub(super) hint: &'static str,
}

const CONVERT: &str = "convert it: qemu-img convert -O qcow2 FILE NEW.qcow2";
const UNPACK: &str = "unpack it and import the disk image inside";
const RECOMPRESS: &str = "decompress it first; gzip, xz and zstd are understood";
const DISK: &str =
    "give a disk image: a cloud image as qcow2, or the raw bytes of a disk that boots";

/// `(offset, magic, what, hint)`. First match wins, so the longer or more telling stand first.
const MAGICS: &[(usize, &[u8], &str, &str)] = &[
    (0, b"KDMV", "a VMware disk (VMDK)", CONVERT),
    (0, b"COWD", "a VMware disk (VMDK)", CONVERT),
    (
        0,
        b"# Disk DescriptorFile",
        "a VMware disk descriptor (VMDK)",
        CONVERT,
    ),
    (
        0x40,
        b"\x7f\x10\xda\xbe",
        "a VirtualBox disk (VDI)",
        CONVERT,
    ),
    (0, b"vhdxfile", "a Hyper-V disk (VHDX)", CONVERT),
    (0, b"conectix", "a Virtual PC disk (VHD)", CONVERT),
    (0, b"QED\0", "a QEMU enhanced disk (QED)", CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels disk", CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels disk", CONVERT),
    (0, b"Bochs Virtual HD Image", "a Bochs disk", CONVERT),
    (0, b"#!/bin/sh\n#V2.0 Format", "a cloop image", CONVERT),
    (
        0,
        b"LUKS\xba\xbe",
        "an encrypted volume (LUKS)",
        "decrypt it first, or encrypt inside the guest",
    ),
    (
        0,
        b"SKUL\xba\xbe",
        "an encrypted volume (LUKS)",
        "decrypt it first, or encrypt inside the guest",
    ),
    (
        0x8001,
        b"CD001",
        "a CD or DVD image (ISO 9660)",
        "installation media are not taken; use a cloud image, see: ghostctl image list",
    ),
    (
        0x8001,
        b"BEA01",
        "a DVD image (UDF)",
        "installation media are not taken; use a cloud image, see: ghostctl image list",
    ),
    (0, b"hsqs", "a squashfs file system", DISK),
    (0, b"sqsh", "a squashfs file system", DISK),
    (0, b"\xe2\xe1\xf5\xe0", "an EROFS file system", DISK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"PK\x03\x04", "a zip archive", UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (0, b"MSWIM\0\0\0", "a Windows image (WIM)", DISK),
    (0, b"!<arch>\n", "a Debian package or ar archive", DISK),
    (0, b"\xed\xab\xee\xdb", "an RPM package", DISK),
    (0, b"070701", "a cpio archive", DISK),
    (0, b"070702", "a cpio archive", DISK),
    (
        0,
        b"\x1f\x8b",
        "a gzip file inside another compression",
        "compress an image once only",
    ),
    (
        0,
        b"\xfd7zXZ\0",
        "an xz file inside another compression",
        "compress an image once only",
    ),
    (
        0,
        b"\x28\xb5\x2f\xfd",
        "a zstd file inside another compression",
        "compress an image once only",
    ),
    (0, b"BZh", "a bzip2 file", RECOMPRESS),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", RECOMPRESS),
    (0, b"\x5d\0\0\x80\0", "an lzma file", RECOMPRESS),
    (0, b"LZIP", "an lzip file", RECOMPRESS),
    (0, b"\x7fELF", "a program (ELF)", DISK),
    (0x202, b"HdrS", "a Linux kernel", DISK),
    (0, b"%PDF", "a PDF document", DISK),
    (0, b"\x89PNG", "a picture", DISK),
    (0, b"\xff\xd8\xff", "a picture", DISK),
];

/// Names what the file is, if it is something known that is no disk.
pub(super) fn identify(head: &[u8], tail: &[u8]) -> Option<Foreign> {
    let by_magic = MAGICS
        .iter()
        .find(|(offset, magic, ..)| head.get(*offset..).is_some_and(|at| at.starts_with(magic)))
        .map(|(_, _, what, hint)| Foreign { what, hint });
    by_magic
        .or_else(|| by_trailer(tail))
        .or_else(|| as_text(head))
}

/// Formats that are known by their last 512 bytes: a fixed VHD is a raw disk plus a footer.
fn by_trailer(tail: &[u8]) -> Option<Foreign> {
    let last = tail.get(tail.len().checked_sub(512)?..)?;
    if last.starts_with(b"conectix") {
        return Some(Foreign {
            what: "a Virtual PC disk (VHD)",
            hint: CONVERT,
        });
    }
    last.starts_with(b"koly").then_some(Foreign {
        what: "a macOS disk image (DMG)",
        hint: CONVERT,
    })
}

fn as_text(head: &[u8]) -> Option<Foreign> {
    let sample = head.get(..512.min(head.len()))?;
    let printable = |byte: &u8| {
        byte.is_ascii_graphic() || matches!(byte, b' ' | b'\t' | b'\n' | b'\r') || *byte >= 0x80
    };
    if sample.is_empty() || !sample.iter().all(printable) {
        return None;
    }
    let text = String::from_utf8_lossy(sample).to_ascii_lowercase();
    let text = text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']);
    let what = if text.starts_with("<!doctype html") || text.starts_with("<html") {
        "a web page (HTML)"
    } else if text.starts_with("<?xml") {
        "an XML document"
    } else if text.starts_with('{') || text.starts_with('[') {
        "a JSON document"
    } else {
        "a text file"
    };
    Some(Foreign {
        what,
        hint: "check the address or the file: a server's error page is often saved in place of the image",
    })
}
