//! One image's disk as another image.

use std::io;

use crate::Disk;
use crate::create::{Creation, Draft};
use crate::error::{Error, Reason};
use crate::open::{Format, Options, open};

/// So many bytes are moved at a time.
const CHUNK: u64 = 2 << 20;
/// Zeros of a raw image are left out by so many bytes.
const BLOCK: usize = 4096;

/// What is converted, and what to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// The image to read.
    pub from: Options,
    /// The image to create; its size is the other's.
    pub to: Creation,
}

/// Converts an image; `progress` is told of bytes that are done. Gives the disk's bytes and those that were written.
///
/// # Errors
/// Which image cannot be read or written; then there is no new one.
pub fn convert(conversion: &Conversion, progress: &mut dyn FnMut(u64)) -> Result<(u64, u64), Error> {
    let Conversion { from, to } = conversion;
    let source = open(&Options { read_only: true, ..from.clone() })?;
    let len = source.size();
    let to = Creation { size: Some(len), ..to.clone() };
    let draft = Draft::new(&to)?;
    let block = match to.format {
        Format::Raw => BLOCK,
        Format::Qcow2 => to.cluster_size.unwrap_or(64 << 10) as usize,
    };
    let mut written = 0;
    let mut offset = 0;
    let mut buffer = vec![0; CHUNK as usize];
    while offset < len {
        let read_error = |error: io::Error| Reason::Host(error).at(&from.path);
        let extent = source.extent(offset).map_err(read_error)?;
        if extent.len == 0 {
            break;
        }
        if extent.zeros {
            offset += extent.len;
            progress(offset);
            continue;
        }
        // Chunks begin where the new image's blocks do.
        let part = extent.len.min(CHUNK - offset % CHUNK);
        let data = &mut buffer[..part as usize];
        source.read(offset, data).map_err(read_error)?;
        let put = write_data(&*draft.disk, offset, data, block);
        written += put.map_err(|error| Reason::Host(error).at(&to.path))?;
        offset += part;
        progress(offset);
    }
    draft.keep(&to)?;
    Ok((len, written))
}

/// Writes what is not zero, block by block where there are zeros in between.
fn write_data(disk: &dyn Disk, offset: u64, data: &[u8], block: usize) -> io::Result<u64> {
    let (mut at, mut written) = (0, 0);
    // The first block may have begun before.
    let end_of_block = |at: usize| {
        let inside = ((offset + at as u64) % block as u64) as usize;
        data.len().min(at + block - inside)
    };
    while at < data.len() {
        let mut end = end_of_block(at);
        if is_zero(&data[at..end]) {
            at = end;
            continue;
        }
        while end < data.len() && !is_zero(&data[end..end_of_block(end)]) {
            end = end_of_block(end);
        }
        disk.write(offset + at as u64, &data[at..end])?;
        written += (end - at) as u64;
        at = end;
    }
    Ok(written)
}

fn is_zero(data: &[u8]) -> bool {
    // Words first: the compiler makes vectors of them.
    let (head, words) = data.as_chunks::<16>();
    head.iter().all(|word| u128::from_ne_bytes(*word) == 0) && words.iter().all(|&byte| byte == 0)
}
