//! Every compression that the kernel's build knows.

use std::io::Write;

use proptest::prelude::*;

use super::super::error::ImageError;
use super::super::{lzop, unpack, unpack_kernel};
use super::synthetic::*;

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn through_liblzma(bytes: &[u8], stream: liblzma::stream::Stream) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lzma(bytes: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    through_liblzma(bytes, liblzma::stream::Stream::new_lzma_encoder(&options).unwrap())
}

/// As the kernel's build has it: the x86 filter before LZMA2.
fn xz(bytes: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    let mut filters = liblzma::stream::Filters::new();
    filters.x86().lzma2(&options);
    let check = liblzma::stream::Check::Crc32;
    through_liblzma(bytes, liblzma::stream::Stream::new_stream_encoder(&filters, check).unwrap())
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).unwrap()
}

/// The legacy frame with blocks of 8 MiB.
fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut out = 0x184c_2102u32.to_le_bytes().to_vec();
    for block in bytes.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        out.extend((block.len() as u32).to_le_bytes());
        out.extend(block);
    }
    out
}

/// A container as lzop 1.04 makes it, with these blocks: unpacked size and packed bytes.
fn lzop_container(blocks: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut out = lzop::MAGIC.to_vec();
    out.extend([0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 3, 9]);
    out.extend(0x0300_0001u32.to_be_bytes());
    out.extend([0; 12]);
    out.extend([3, b'a', b'b', b'c', 0, 0, 0, 0]);
    for (unpacked, packed) in blocks {
        out.extend((*unpacked as u32).to_be_bytes());
        out.extend((packed.len() as u32).to_be_bytes());
        out.extend([0; 4]);
        out.extend(packed);
    }
    out.extend([0; 4]);
    out
}

/// Stored blocks: LZO that is no shorter than its source.
fn lzo(bytes: &[u8]) -> Vec<u8> {
    let blocks: Vec<_> = bytes.chunks(4096).map(|block| (block.len(), block.to_vec())).collect();
    lzop_container(&blocks)
}

type Compressor = fn(&[u8]) -> Vec<u8>;

const ALL: [(&str, Compressor); 8] = [
    ("uncompressed", |bytes| bytes.to_vec()),
    ("gzip", gzip),
    ("bzip2", bzip2),
    ("lzma", lzma),
    ("xz", xz),
    ("lzo", lzo),
    ("lz4", lz4),
    ("zstd", zstd),
];

#[test]
fn a_kernel_comes_out_of_every_compression_as_it_went_in() {
    let elf = elf(&text(), None);
    for (name, compress) in ALL {
        let kernel = bzimage(&compress(&elf), elf.len());
        let unpacked = unpack_kernel(&kernel).unwrap_or_else(|error| panic!("{name}: {error}"));
        // Uncompressed bytes do not tell where the size begins.
        assert!(unpacked.starts_with(&elf) && unpacked.len() <= elf.len() + 4, "{name}");
    }
}

#[test]
fn an_elf_file_is_unpacked_already() {
    let elf = elf(&text(), None);
    assert_eq!(unpack_kernel(&elf).unwrap(), elf);
}

#[test]
fn a_payload_that_is_cut_is_damaged_and_says_in_which_format() {
    let elf = elf(&text(), None);
    for (name, compress) in &ALL[1..] {
        let compressed = compress(&elf);
        for part in [1, 2, 3] {
            let cut = &compressed[..compressed.len() * part / 4];
            match unpack_kernel(&bzimage(cut, elf.len())) {
                Err(ImageError::Damaged { format, .. }) => assert_eq!(format, *name),
                other => panic!("{name} cut to {part}/4: {other:?}"),
            }
        }
    }
}

#[test]
fn a_payload_that_unpacks_without_end_is_stopped_at_the_limit() {
    let bomb = [b"\x7fELF".to_vec(), vec![0; 3 << 20]].concat();
    for (name, compress) in ALL {
        let result = unpack::unpack(&compress(&bomb), 1 << 20);
        assert_eq!(result, Err(ImageError::UnpackedTooLarge { limit: 1 << 20 }), "{name}");
    }
}

#[test]
fn unknown_and_foreign_payloads_are_named() {
    let error = |payload: &[u8]| unpack_kernel(&bzimage(payload, 10)).unwrap_err().to_string();
    assert_eq!(
        error(&[1, 2, 3, 4, 5, 6]),
        "the bzImage's payload is in no known compression: it starts with 01 02 03 04 05 06 0a 00"
    );
    assert_eq!(
        error(&gzip(b"no kernel")),
        "the bzImage's unpacked payload is damaged: it does not hold an ELF file"
    );
    let mut i386 = elf(&text(), None);
    i386[4] = 1;
    i386[18] = 3;
    assert_eq!(error(&gzip(&i386)), "the kernel is for 32-bit x86 (i386), not for x86-64");
}

fn unpack_block(unpacked: usize, packed: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    lzop::unpack(&lzop_container(&[(unpacked, packed.to_vec())]), &mut out, 1 << 20)
        .map_err(|error| error.to_string())?;
    Ok(out)
}

const END: [u8; 3] = [0x11, 0, 0];

#[test]
fn lzo_copies_literals_and_matches() {
    // Four literals, then 8 bytes from 4 back (they overlap), two literals with them.
    let packed = [&[17 + 4][..], b"abcd", &[7 << 5 | 3 << 2 | 2, 0], b"xy", &END].concat();
    assert_eq!(unpack_block(14, &packed).unwrap(), b"abcdabcdabcdxy");
    // A long run of literals, 3 + 15 + 255 + 7, and a match of 2 + 31 + 10.
    let packed = [&[0, 0, 7][..], &[7; 280], &[32, 10, 0, 0], &END].concat();
    assert_eq!(unpack_block(280 + 43, &packed).unwrap(), [7; 323]);
    // A long match at distance 1: 2 + 31 + 10.
    let packed = [&[17 + 4][..], b"aaab", &[32, 10, 0, 0], &END].concat();
    assert_eq!(unpack_block(47, &packed).unwrap(), [b"aaab".to_vec(), vec![b'b'; 43]].concat());
}

#[test]
fn lzo_that_lies_about_its_size_or_reaches_before_the_block_is_refused() {
    let packed = [&[17 + 4][..], b"abcd", &END].concat();
    assert!(unpack_block(9, &packed).unwrap_err().contains("not the size"));
    let longer = [&[17 + 4][..], b"abcd", &[32, 10, 0, 0], &END].concat();
    assert!(unpack_block(40, &longer).unwrap_err().contains("longer than it claims"));
    let before = [&[17 + 4][..], b"abcd", &[32 | 4, 4 << 2, 0], &END].concat();
    assert!(unpack_block(40, &before).unwrap_err().contains("before the block"));
    let zeros = [&[17 + 4][..], b"abcd", &[32], &[0; 4000]].concat();
    assert!(unpack_block(5000, &zeros).is_err());
    assert!(unpack_block(usize::MAX, &packed).unwrap_err().contains("impossible size"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn random_lzo_never_panics(packed in prop::collection::vec(any::<u8>(), 1..300)) {
        let _ = unpack_block(1 << 16, &packed);
    }

    #[test]
    fn a_changed_payload_never_panics(
        format in 0usize..8,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let elf = elf(&text()[..3000], None);
        let mut compressed = ALL[format].1(&elf);
        for (at, byte) in changes {
            let at = at.index(compressed.len());
            compressed[at] = byte;
        }
        if let Ok(bytes) = unpack::unpack(&compressed, 1 << 20) {
            prop_assert!(bytes.len() <= 1 << 20);
        }
    }
}
