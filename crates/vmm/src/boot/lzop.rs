//! Unpacking what `lzop` packs: its container, and the LZO1X streams in it.
//! The Linux kernel's documentation, *LZO stream format as understood by Linux's LZO decompressor*.

use std::io;

/// The container's first bytes.
pub(super) const MAGIC: &[u8] = b"\x89LZO\0\r\n\x1a\n";

/// The container's version from which on it has the longer header.
const LONG_HEADER_VERSION: u16 = 0x940;
/// The most that one block unpacks to, in bytes.
const MAX_BLOCK: usize = 64 << 20;

/// Bits of the container's flags.
mod flags {
    /// Checksums of the unpacked bytes, each of four bytes.
    pub(super) const UNPACKED: [u32; 2] = [0x001, 0x100];
    /// Checksums of the packed bytes.
    pub(super) const PACKED: [u32; 2] = [0x002, 0x200];
    /// An extra field after the header.
    pub(super) const EXTRA: u32 = 0x040;
    /// A filter's number in the header.
    pub(super) const FILTER: u32 = 0x800;
}

fn damaged(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

/// Bytes to be taken from the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(|| damaged("it ends early"))?;
        self.0 = rest;
        Ok(taken)
    }
    fn byte(&mut self) -> io::Result<usize> {
        Ok(usize::from(self.take(1)?[0]))
    }
    fn word(&mut self) -> io::Result<u16> {
        Ok(u16::from_be_bytes([self.byte()? as u8, self.byte()? as u8]))
    }
    fn dword(&mut self) -> io::Result<u32> {
        Ok(u32::from(self.word()?) << 16 | u32::from(self.word()?))
    }
    fn word_le(&mut self) -> io::Result<usize> {
        Ok(usize::from(self.word()?.swap_bytes()))
    }
    /// A length that continues: each zero byte counts 255, the first other one ends it.
    fn long_length(&mut self, base: usize, limit: usize) -> io::Result<usize> {
        let mut length = base;
        loop {
            match self.byte()? {
                0 if length > limit => return Err(damaged("a length exceeds the block")),
                0 => length += 255,
                last => return Ok(length + last),
            }
        }
    }
}

/// Unpacks a container to the end of its blocks, or past `limit` bytes.
pub(super) fn unpack(payload: &[u8], out: &mut Vec<u8>, limit: u64) -> io::Result<()> {
    let mut input = Input(payload);
    let flags = read_header(&mut input)?;
    let count = |kinds: [u32; 2]| kinds.iter().filter(|&&kind| flags & kind != 0).count();
    while out.len() as u64 <= limit {
        let unpacked = input.dword()? as usize;
        if unpacked == 0 {
            break;
        }
        let packed = input.dword()? as usize;
        if unpacked > MAX_BLOCK || packed > unpacked {
            return Err(damaged("a block has an impossible size"));
        }
        input.take(4 * count(flags::UNPACKED))?;
        if packed == unpacked {
            out.extend_from_slice(input.take(packed)?);
            continue;
        }
        input.take(4 * count(flags::PACKED))?;
        Block { out, start: 0, len: unpacked }.unpack(Input(input.take(packed)?))?;
    }
    Ok(())
}

/// Reads the container's header; gives its flags.
fn read_header(input: &mut Input<'_>) -> io::Result<u32> {
    input.take(MAGIC.len())?;
    let long = input.word()? >= LONG_HEADER_VERSION;
    // The library's version, the version that is needed, the method and the level.
    input.take(if long { 6 } else { 3 })?;
    let flags = input.dword()?;
    // The filter, the file's mode and its time.
    input.take(if flags & flags::FILTER != 0 { 4 } else { 0 })?;
    input.take(if long { 12 } else { 8 })?;
    let name = input.byte()?;
    // The name and the header's checksum.
    input.take(name + 4)?;
    if flags & flags::EXTRA != 0 {
        return Err(damaged("it has an extra field, which no kernel has"));
    }
    Ok(flags)
}

/// A block being unpacked.
struct Block<'a> {
    out: &'a mut Vec<u8>,
    /// Where the block starts in `out`: nothing before it can be copied.
    start: usize,
    /// Bytes that the block has when it is complete.
    len: usize,
}

impl Block<'_> {
    fn unpack(mut self, mut input: Input<'_>) -> io::Result<()> {
        self.start = self.out.len();
        // How many literals the last instruction copied: 0, 1 to 3, or 4 for more.
        let mut state = match input.0.first() {
            Some(&first @ 18..) => {
                input.byte()?;
                self.literals(&mut input, usize::from(first) - 17)?
            }
            _ => 0,
        };
        loop {
            let instruction = input.byte()?;
            let (distance, length, literals) = match (instruction, state) {
                (64.., _) => {
                    let distance = (input.byte()? << 3) + (instruction >> 2 & 7) + 1;
                    (distance, (instruction >> 5) + 1, instruction & 3)
                }
                (32..64, _) => {
                    let length = self.length(&mut input, instruction & 31, 31)?;
                    let operand = input.word_le()?;
                    ((operand >> 2) + 1, length + 2, operand & 3)
                }
                (16..32, _) => {
                    let length = self.length(&mut input, instruction & 7, 7)?;
                    let operand = input.word_le()?;
                    let distance = ((instruction & 8) << 11) + (operand >> 2);
                    if distance == 0 {
                        break;
                    }
                    (distance + 0x4000, length + 2, operand & 3)
                }
                (_, 0) => {
                    let length = self.length(&mut input, instruction, 15)? + 3;
                    state = self.literals(&mut input, length)?;
                    continue;
                }
                (_, 1..4) => ((input.byte()? << 2) + (instruction >> 2) + 1, 2, instruction & 3),
                (_, _) => ((input.byte()? << 2) + (instruction >> 2) + 2049, 3, instruction & 3),
            };
            self.copy(distance, length)?;
            state = self.literals(&mut input, literals)?;
        }
        if self.done() != self.len {
            return Err(damaged("a block has not the size that it claims"));
        }
        Ok(())
    }

    /// A length of which the instruction has the short form, `base` the start of the long one.
    fn length(&self, input: &mut Input<'_>, short: usize, base: usize) -> io::Result<usize> {
        if short == 0 { input.long_length(base, self.len) } else { Ok(short) }
    }

    fn done(&self) -> usize {
        self.out.len() - self.start
    }

    fn check_room(&self, length: usize) -> io::Result<()> {
        if length > self.len - self.done() {
            return Err(damaged("a block is longer than it claims"));
        }
        Ok(())
    }

    /// Copies bytes from the input; gives the state afterwards.
    fn literals(&mut self, input: &mut Input<'_>, length: usize) -> io::Result<usize> {
        self.check_room(length)?;
        self.out.extend_from_slice(input.take(length)?);
        Ok(length.min(4))
    }

    /// Copies bytes from `distance` bytes back; they may overlap with what they make.
    fn copy(&mut self, distance: usize, length: usize) -> io::Result<()> {
        self.check_room(length)?;
        if distance > self.done() {
            return Err(damaged("it copies from before the block"));
        }
        let mut left = length;
        while left > 0 {
            let from = self.out.len() - distance;
            let count = left.min(distance);
            self.out.extend_from_within(from..from + count);
            left -= count;
        }
        Ok(())
    }
}
