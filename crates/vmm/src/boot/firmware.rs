//! Firmware: a BIOS image as ROM below 4 GiB, entered at the reset vector.
//!
//! ```text
//! 0xe_0000     the image's last 128 KiB, or RAM in front of them as the host bridge says
//! 4 GiB - size the image
//! 0xffff_fff0  the reset vector, in real mode
//! ```
//!
//! SDM vol. 3, *First Instruction Executed*.

use std::ops::Range;
use std::path::Path;

use engine::VcpuState;
use guest_memory::{FileRegion, GuestMemory, MemoryError, Region, ShadowArea};

use super::error::{BootError, FirmwareError};
use super::{low_memory, read_file};
use crate::layout;

/// An image is made of blocks of so many bytes, one of which is the segment of the reset vector.
const BLOCK: u64 = 64 << 10;
/// The most bytes of an image: more would reach into other parts of the address space.
pub const MAX_SIZE: u64 = 8 << 20;
/// The most of its bytes that show below 1 MiB.
const SHOWN: u64 = 128 << 10;

/// A firmware image, checked.
#[derive(Clone, Debug)]
pub struct Firmware(Vec<u8>);

impl Firmware {
    /// Reads an image.
    ///
    /// # Errors
    /// [`FirmwareError`] for what is no file, or cannot be an image by its size.
    pub fn read(path: &Path) -> Result<Self, FirmwareError> {
        let bytes = read_file(path, layout::MAX_MEMORY)?;
        let error = |what| FirmwareError::Size { path: path.to_owned(), bytes: bytes.len() as u64, what };
        match bytes.len() as u64 {
            len if len > MAX_SIZE => Err(error("more than the 8 MiB below 4 GiB that it can have")),
            len if len % BLOCK != 0 => {
                Err(error("no multiple of 64 KiB, so its reset vector is not at its end"))
            }
            _ => Ok(Self(bytes)),
        }
    }

    /// Where the ROM lies, guest-physical.
    fn rom(&self) -> Range<u64> {
        let end = layout::MMIO_HOLE.end;
        end - self.0.len() as u64..end
    }

    /// Maps a machine's memory, of `regions` as they are without firmware, with the ROM and its shadow RAM, and files.
    ///
    /// # Errors
    /// As [`GuestMemory::with_files`].
    pub fn map_memory(
        &self,
        mut regions: Vec<Region>,
        files: &[FileRegion],
    ) -> Result<GuestMemory, MemoryError> {
        let rom = self.rom();
        let above = regions.iter().position(|region| region.start >= rom.end).unwrap_or(regions.len());
        let len = rom.end - rom.start;
        regions.insert(above, Region { start: rom.start, len, read_only: true });
        GuestMemory::with_shadow(&regions, files, ShadowArea { ram: layout::FIRMWARE, rom, shown: SHOWN })
    }

    /// Fills ROM and shadow RAM; gives the boot processor's state.
    ///
    /// # Errors
    /// [`BootError::NoRam`] where the memory is not that of [`Self::map_memory`].
    pub fn load(&self, memory: &GuestMemory) -> Result<VcpuState, BootError> {
        low_memory::write(memory, self.rom().start, &self.0)?;
        let shown = &self.0[self.0.len().saturating_sub(SHOWN as usize)..];
        low_memory::write(memory, layout::FIRMWARE.end - shown.len() as u64, shown)?;
        Ok(VcpuState::reset())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn image(size: usize) -> Result<Firmware, FirmwareError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), (0..size).map(|at| (at >> 12) as u8).collect::<Vec<_>>()).unwrap();
        Firmware::read(file.path())
    }

    #[test]
    fn an_image_lies_below_4_gib_and_its_end_below_1_mib() {
        let firmware = image(256 << 10).unwrap();
        let memory = firmware.map_memory(layout::regions(4 << 30).unwrap(), &[]).unwrap();
        let state = firmware.load(&memory).unwrap();
        assert_eq!(state, VcpuState::reset());
        for (rom, shown) in [(0xffff_fff0u64, 0xf_fff0u64), (0xfffe_0000, 0xe_0000)] {
            let location = memory.locate(rom).unwrap();
            assert!(location.read_only);
            assert_eq!(memory.locate(shown), Some(location));
        }
        assert_eq!(memory.load_physical::<u8>(0xfffc_1000), Some(1));
        assert_eq!(memory.locate(0xd_ffff), None);
        let under: u8 = memory.vm().read_obj(GuestAddress(0xe_0000)).unwrap();
        assert_eq!(under, 32, "the RAM behind it has the same bytes");
        assert_eq!(memory.locate(5 << 30), None);
        assert!(memory.locate(4 << 30).is_some());
    }

    #[test]
    fn a_small_image_shows_whole() {
        let firmware = image(64 << 10).unwrap();
        let memory = firmware.map_memory(layout::regions(64 << 20).unwrap(), &[]).unwrap();
        firmware.load(&memory).unwrap();
        assert_eq!(memory.locate(0xe_ffff), None);
        assert_eq!(memory.load_physical::<u8>(0xf_1000), Some(1));
    }

    #[test]
    fn sizes_that_no_image_has_are_refused_with_the_reason() {
        for (size, why) in
            [(0, "is empty"), (1000, "64 KiB"), (65537, "64 KiB"), (8 << 20 | 0x1_0000, "8 MiB")]
        {
            let error = image(size).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(image(8 << 20).is_ok());
        let directory = Firmware::read(Path::new("/")).unwrap_err().to_string();
        assert_eq!(directory, "/ is a directory, not a file");
    }
}
