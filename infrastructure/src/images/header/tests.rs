//! The parser on bytes that nobody meant as an image.

use proptest::prelude::*;

use super::*;

fn never_panics(bytes: &[u8]) {
    let sample = Sample::of_bytes(bytes);
    if let Ok(admitted) = admit(&sample, ByteSize::from_gib(1)) {
        assert!(admitted.virtual_size <= ByteSize::from_gib(1));
    }
    if let Ok(header) = Qcow2Header::parse(&sample.head) {
        let _ = header.admit(sample.file_size);
        let _ = header.must_be_flattened();
    }
}

/// A header of version 3 that is well-formed, with a 64 KiB cluster.
fn good() -> Vec<u8> {
    let mut image = vec![0u8; 4 * 65536];
    image[..4].copy_from_slice(qcow2::MAGIC);
    image[7] = 3;
    image[23] = 16;
    image[24..32].copy_from_slice(&(64u64 << 20).to_be_bytes());
    image[39] = 1;
    image[40..48].copy_from_slice(&(3u64 * 65536).to_be_bytes());
    image[48..56].copy_from_slice(&65536u64.to_be_bytes());
    image[59] = 1;
    image[99] = 4;
    image[103] = 104;
    image
}

#[test]
fn the_smallest_good_header_passes() {
    let admitted = admit(&Sample::of_bytes(&good()), ByteSize::from_gib(1)).unwrap();
    assert_eq!(admitted.virtual_size, ByteSize::from_mib(64));
    assert_eq!(admitted.format, ImageFormat::Qcow2);
    assert_eq!(admitted.flatten, None);
}

#[test]
fn a_sample_of_a_file_is_that_of_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    for length in [0, 1, 511, 512, 513, HEAD_LENGTH, HEAD_LENGTH + 777] {
        let bytes: Vec<u8> = (0..length).map(|at| (at % 253) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let of_file = Sample::of(&File::open(&path).unwrap()).unwrap();
        let of_bytes = Sample::of_bytes(&bytes);
        assert_eq!(of_file.head, of_bytes.head);
        assert_eq!(of_file.tail, of_bytes.tail);
        assert_eq!(of_file.file_size, of_bytes.file_size);
    }
}

#[test]
fn disks_that_boot_are_taken_as_raw() {
    let take = |offset: usize, magic: &[u8]| {
        let mut disk = vec![0u8; 65536];
        disk[offset..offset + magic.len()].copy_from_slice(magic);
        admit(&Sample::of_bytes(&disk), ByteSize::from_gib(1))
    };
    for (offset, magic) in [
        (510, &b"\x55\xaa"[..]),
        (512, b"EFI PART"),
        (4096, b"EFI PART"),
    ] {
        assert_eq!(
            take(offset, magic).unwrap().format,
            ImageFormat::Raw,
            "{offset}"
        );
    }
    assert!(take(511, b"\x55\xaa").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        never_panics(&bytes);
    }

    #[test]
    fn random_bytes_behind_the_magic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let mut image = qcow2::MAGIC.to_vec();
        image.extend(bytes);
        never_panics(&image);
    }

    /// A good header with a few bytes changed, near the fields that matter; cut anywhere.
    #[test]
    fn almost_good_headers(
        changes in proptest::collection::vec((0usize..160, any::<u8>()), 1..6),
        length in 0usize..5 * 65536,
    ) {
        let mut image = good();
        for (at, value) in changes {
            image[at] = value;
        }
        image.truncate(length);
        never_panics(&image);
    }

    /// Whatever is admitted reaches nowhere: neither name nor flag of another file is in it.
    #[test]
    fn what_is_admitted_is_self_contained(
        changes in proptest::collection::vec((0usize..160, any::<u8>()), 1..4),
    ) {
        let mut image = good();
        for (at, value) in changes {
            image[at] = value;
        }
        let sample = Sample::of_bytes(&image);
        if admit(&sample, ByteSize::from_gib(1)).is_ok() && image.starts_with(qcow2::MAGIC) {
            let header = Qcow2Header::parse(&sample.head).unwrap();
            prop_assert_eq!(header.backing_file, None);
            prop_assert_eq!(header.backing_format, None);
            prop_assert!(!header.names_data_file && !header.names_encryption);
            prop_assert_eq!(header.crypt_method, 0);
            if header.version == 3 {
                prop_assert_eq!(header.incompatible_features & !0b1_1001, 0);
            }
        }
    }
}
