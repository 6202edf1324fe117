//! Unpacking the compressed kernel in a bzImage, whatever its compression.
//!
//! The kernel's build appends the unpacked size to the compressed stream, in four bytes; so every format here ends by
//! itself and ignores what follows.

use std::io::{self, Read};

use super::error::ImageError;

/// The largest kernel that is unpacked, in bytes.
pub const MAX_UNPACKED: u64 = 1 << 30;

/// The most memory that a stream's header can make a decoder take, in bytes.
const DECODER_MEMORY: u64 = 256 << 20;
/// A frame's bytes before its blocks, and the most that one of its blocks unpacks to, in bytes. LZ4 Frame Format
/// Description, *Legacy frame*.
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102u32.to_le_bytes();
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// What the kernel's build can compress with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

impl Compression {
    /// Tells the format by its first bytes.
    fn detect(payload: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 8] = [
            (b"\x7fELF", Compression::None),
            (&[0x1f, 0x8b], Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (&[0x5d, 0, 0], Compression::Lzma),
            (b"\xfd7zXZ\0", Compression::Xz),
            (super::lzop::MAGIC, Compression::Lzo),
            (&LZ4_LEGACY_MAGIC, Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
        ];
        MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)).map(|&(_, format)| format)
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Lzo => "lzo",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Unpacks a payload to at most `limit` bytes.
pub(super) fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, ImageError> {
    let format = Compression::detect(payload)
        .ok_or_else(|| ImageError::UnknownCompression { start: payload[..payload.len().min(8)].to_vec() })?;
    let mut out = Vec::with_capacity(capacity(payload, limit));
    match format {
        Compression::None => read_all(payload, &mut out, limit),
        Compression::Gzip => read_all(flate2::bufread::GzDecoder::new(payload), &mut out, limit),
        Compression::Bzip2 => read_all(bzip2::bufread::BzDecoder::new(payload), &mut out, limit),
        Compression::Lzma => {
            xz(liblzma::stream::Stream::new_lzma_decoder(DECODER_MEMORY), payload, &mut out, limit)
        }
        Compression::Xz => {
            xz(liblzma::stream::Stream::new_stream_decoder(DECODER_MEMORY, 0), payload, &mut out, limit)
        }
        Compression::Lzo => super::lzop::unpack(payload, &mut out, limit),
        Compression::Lz4 => lz4(payload, &mut out, limit),
        Compression::Zstd => zstd::stream::read::Decoder::with_buffer(payload)
            .and_then(|decoder| read_all(decoder.single_frame(), &mut out, limit)),
    }
    .map_err(|error| ImageError::Damaged { format: format.name(), reason: error.to_string() })?;
    if out.len() as u64 > limit {
        return Err(ImageError::UnpackedTooLarge { limit });
    }
    Ok(out)
}

/// Room for the size that the payload claims, within what its compressed size makes likely.
fn capacity(payload: &[u8], limit: u64) -> usize {
    let claimed = payload.last_chunk().map_or(0, |&size| u32::from_le_bytes(size));
    let likely = (payload.len() as u64).saturating_mul(16).min(limit);
    usize::try_from(u64::from(claimed).min(likely)).unwrap_or(0)
}

/// Reads to the stream's end, or one byte past the limit.
fn read_all(stream: impl Read, out: &mut Vec<u8>, limit: u64) -> io::Result<()> {
    stream.take(limit.saturating_add(1)).read_to_end(out).map(drop)
}

fn xz(
    stream: Result<liblzma::stream::Stream, liblzma::stream::Error>,
    payload: &[u8],
    out: &mut Vec<u8>,
    limit: u64,
) -> io::Result<()> {
    read_all(liblzma::bufread::XzDecoder::new_stream(payload, stream?), out, limit)
}

/// Legacy LZ4 frames: blocks with their compressed size before them.
fn lz4(mut rest: &[u8], out: &mut Vec<u8>, limit: u64) -> io::Result<()> {
    let damaged = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let mut block = vec![0; LZ4_LEGACY_BLOCK];
    // Four last bytes are the unpacked size.
    while rest.len() > 4 && out.len() as u64 <= limit {
        let Some((&size, tail)) = rest.split_first_chunk() else { break };
        if size == LZ4_LEGACY_MAGIC {
            rest = tail;
            continue;
        }
        let size = u32::from_le_bytes(size) as usize;
        let (compressed, tail) =
            tail.split_at_checked(size).ok_or_else(|| damaged("a block is longer than the payload"))?;
        let len = lz4_flex::block::decompress_into(compressed, &mut block)
            .map_err(|error| damaged(&error.to_string()))?;
        out.extend_from_slice(&block[..len]);
        rest = tail;
    }
    Ok(())
}
