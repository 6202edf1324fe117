//! What is in memory when the machine starts: firmware, or a kernel with what its protocol hands over.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use devices::pci::{PamEffect, PamSegment};
use engine::{Attention, Signals, VcpuState};
use guest_memory::{FileRegion, GuestMemory, Shadowing};

use crate::boot::firmware::Firmware;
use crate::boot::{self, BootPayload, Module};
use crate::config::{Boot, BootConfig, ConfigError, MachineConfig};
use crate::engines::Engine;
use crate::error::BuildError;
use crate::layout;

/// Maps the memory, with these files as part of it, and brings the guest into it, a kernel with `arguments` behind its
/// command line; gives the memory and the boot processor's state.
///
/// # Errors
/// [`BuildError`] for files that cannot be booted, and where the host gives no memory.
pub fn load(
    config: &MachineConfig,
    files: &[FileRegion],
    arguments: &str,
) -> Result<(GuestMemory, VcpuState), BuildError> {
    let regions = layout::regions(config.memory).map_err(ConfigError::Memory)?;
    match &config.boot {
        Boot::Kernel(boot) => {
            let memory = GuestMemory::with_files(&regions, files)?;
            let state = load_kernel(boot, arguments, &memory)?;
            Ok((memory, state))
        }
        Boot::Firmware(boot) => {
            let firmware = Firmware::read(&boot.image)?;
            let memory = firmware.map_memory(regions, files)?;
            let failed = |source| BuildError::Boot { kernel: boot.image.clone(), source };
            let state = firmware.load(&memory).map_err(failed)?;
            Ok((memory, state))
        }
    }
}

fn load_kernel(boot: &BootConfig, arguments: &str, memory: &GuestMemory) -> Result<VcpuState, BuildError> {
    let kernel = boot::read_file(&boot.kernel, memory.ram_len())?;
    let mut initrd = Vec::new();
    if let Some(path) = &boot.initrd {
        initrd = boot::read_file(path, memory.ram_len())?;
    }
    if !boot.overlay.is_empty() {
        // An archive begins at a multiple of 4 bytes.
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend_from_slice(&boot.overlay);
    }
    let mut modules = Vec::new();
    for module in &boot.modules {
        let text = format!("{} {}", module.path.display(), module.arguments).trim_end().to_owned();
        modules.push((boot::read_file(&module.path, memory.ram_len())?, text));
    }
    let modules: Vec<_> = modules.iter().map(|(bytes, text)| Module { bytes, text }).collect();
    let initrd_name = boot.initrd.as_ref().map(|path| path.to_string_lossy()).unwrap_or_default();
    let payload = BootPayload {
        kernel: &kernel,
        kernel_name: &boot.kernel.to_string_lossy(),
        initrd: (!initrd.is_empty()).then_some(&initrd[..]),
        initrd_name: &initrd_name,
        modules: &modules,
        cmdline: &format!("{}{arguments}", boot.cmdline),
        protocol: boot.protocol,
        seed: seed(),
    };
    let failed = |source| BuildError::Boot { kernel: boot.kernel.clone(), source };
    let loaded = boot::load(memory, &payload, layout::ACPI_TABLES.start).map_err(failed)?;
    log::debug!(
        "{} at {:#x?}, entered at {:#x} by the {} protocol",
        boot.kernel.display(),
        loaded.kernel,
        loaded.state.rip,
        loaded.protocol
    );
    Ok(loaded.state)
}

/// Random bytes for the guest. Without them it waits for entropy of its own.
fn seed() -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).ok()?;
    Some(bytes)
}

/// What the host bridge's attribute map does to a machine with firmware: the memory changes, and every vCPU is asked to
/// forget where it lay. `None` for a machine without.
pub fn attribute_map(
    memory: &GuestMemory,
    engine: &Arc<Engine>,
    attentions: &[Arc<Attention>],
) -> Option<PamEffect> {
    memory.shadow_area()?;
    let (memory, engine, attentions) = (memory.clone(), engine.clone(), attentions.to_vec());
    Some(Box::new(move |segments: &[PamSegment]| {
        for PamSegment { range, read, write } in segments {
            memory.set_shadowing(range.clone(), Shadowing { read: *read, write: *write });
        }
        if let Err(error) = engine.remap_shadow() {
            log::error!("the shadow RAM cannot be mapped: {error}");
        }
        for attention in &attentions {
            attention.raise(Signals::ENGINE);
        }
    }))
}
