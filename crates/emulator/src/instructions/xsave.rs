//! FXSAVE, XSAVE and their kin. SDM vol. 1, *Managing State Using the XSAVE Feature Set*.

use std::ops::Range;

use x86::{Cr0, Cr4, Exception, Vector, Xcr0};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop, flag};
use crate::native::Component;

/// Bytes of the legacy region.
const LEGACY: usize = 512;
/// Bytes of the legacy region and the header.
const EXTENDED: usize = 576;
/// Where MXCSR and its mask stand.
const MXCSR: std::ops::Range<usize> = 24..32;
/// The bytes of the legacy region that belong to software.
const AVAILABLE: usize = 416;
/// XCOMP_BV bit 63: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// The largest area.
const LARGEST: usize = 2696;
/// The largest component.
const LARGEST_COMPONENT: usize = 1024;

/// The components after the legacy region, in the order of their bits.
const EXTENSIONS: [Component; 5] =
    [Component::Avx, Component::Opmask, Component::ZmmHi256, Component::Hi16Zmm, Component::Pkru];

fn check_available(cpu: &mut Cpu, undefined: bool) -> Result<(), Stop> {
    if undefined {
        return Err(cpu.ud());
    }
    if cpu.cr0.contains(Cr0::TS) {
        return Err(cpu.raise(Exception::new(Vector::DeviceNotAvailable)));
    }
    Ok(())
}

/// Bytes that are accessed at once: a segment's end, or 4 GiB, may be between two of them.
const PIECE: usize = 16;

/// The operand's linear address, aligned; `len` bytes of it are within its segment.
fn area(cpu: &mut Cpu, insn: &Insn, (alignment, len): (u64, usize), write: bool) -> Result<u64, Stop> {
    let offset = cpu.effective(insn);
    let mut linear = offset.wrapping_add(cpu.bases[usize::from(insn.segment & 7)]);
    if insn.has(flag::CHECKED) {
        linear &= 0xffff_ffff;
        for at in (0..len).step_by(PIECE) {
            let offset = offset.wrapping_add(at as u64) & 0xffff_ffff;
            cpu.segmented(insn.segment, offset, PIECE.min(len - at) as u64, write)?;
        }
    }
    if !linear.is_multiple_of(alignment) {
        return Err(cpu.gp0());
    }
    Ok(linear)
}

fn bytes_at(area: &[u8], at: usize) -> u64 {
    area.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// The bytes of a component that belong to registers which only 64-bit mode has: elsewhere they are neither saved nor
/// restored.
fn out_of_reach(cpu: &Cpu, component: Component) -> std::ops::Range<usize> {
    match component {
        _ if cpu.mode.is_64() => 0..0,
        Component::Sse | Component::Avx => 128..256,
        Component::ZmmHi256 => 256..512,
        Component::Hi16Zmm => 0..1024,
        Component::X87 | Component::Opmask | Component::Pkru => 0..0,
    }
}

/// Saves what of a component is within reach.
fn save(cpu: &Cpu, component: Component, area: &mut [u8]) {
    let kept = out_of_reach(cpu, component);
    if kept.is_empty() {
        return cpu.vector.save_component(component, area);
    }
    let mut bytes = [0; LARGEST_COMPONENT];
    let Some(area) = area.get_mut(..component.size()) else { return };
    let bytes = &mut bytes[..component.size()];
    bytes.copy_from_slice(area);
    cpu.vector.save_component(component, bytes);
    bytes[kept.clone()].copy_from_slice(&area[kept]);
    area.copy_from_slice(bytes);
}

/// Loads what of a component is within reach, from bytes or with its initial values.
fn load(cpu: &mut Cpu, component: Component, area: Option<&[u8]>) {
    let (kept, mut old) = (out_of_reach(cpu, component), [0; LARGEST_COMPONENT]);
    let old = &mut old[..component.size()];
    if !kept.is_empty() {
        cpu.vector.save_component(component, old);
    }
    match area.and_then(|area| area.get(..component.size())) {
        Some(new) => cpu.vector.load_component(component, new),
        None => cpu.vector.init_component(component),
    }
    if !kept.is_empty() {
        let mut merged = [0; LARGEST_COMPONENT];
        let merged = &mut merged[..component.size()];
        cpu.vector.save_component(component, merged);
        merged[kept.clone()].copy_from_slice(&old[kept]);
        cpu.vector.load_component(component, merged);
    }
}

/// Whether the instruction has REX.W: then the x87 pointers have 64 bits, else 32 and a selector, which is zero.
fn is_wide(insn: &Insn) -> bool {
    use iced_x86::Mnemonic::{
        Fxrstor64, Fxsave64, Xrstor64, Xrstors64, Xsave64, Xsavec64, Xsaveopt64, Xsaves64,
    };
    [Fxsave64, Fxrstor64, Xsave64, Xsavec64, Xsaveopt64, Xsaves64, Xrstor64, Xrstors64]
        .iter()
        .any(|&mnemonic| mnemonic as u16 == insn.mnemonic)
}

/// Takes the selectors and the pointers' upper halves out of an x87 image.
fn narrow_pointers(image: &mut [u8]) {
    image[12..16].fill(0);
    image[20..24].fill(0);
}

/// FXSAVE and FXSAVE64.
pub fn fxsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.cr0.intersects(Cr0::EM | Cr0::TS) {
        return Err(cpu.raise(Exception::new(Vector::DeviceNotAvailable)));
    }
    let linear = area(cpu, insn, (16, LEGACY), true)?;
    let mut image = [0; LEGACY];
    cpu.probe_write(cpu.mmu.view, linear, LEGACY)?;
    cpu.read_bytes(cpu.mmu.view, linear, &mut image)?;
    let sse = cpu.cr4.contains(Cr4::OSFXSR);
    save_legacy(cpu, insn, &mut image, Legacy { x87: true, sse, mxcsr: true });
    cpu.write_bytes(cpu.mmu.view, linear, &image[..AVAILABLE])
}

/// What is saved in the legacy region.
struct Legacy {
    x87: bool,
    sse: bool,
    mxcsr: bool,
}

fn save_legacy(cpu: &Cpu, insn: &Insn, image: &mut [u8], what: Legacy) {
    if what.x87 {
        save(cpu, Component::X87, &mut image[Component::X87.offset()..]);
        if !is_wide(insn) {
            narrow_pointers(image);
        }
    }
    if what.mxcsr {
        image[MXCSR].copy_from_slice(&cpu.vector.mxcsr_field());
    }
    if what.sse {
        save(cpu, Component::Sse, &mut image[Component::Sse.offset()..]);
    }
}

/// FXRSTOR and FXRSTOR64.
pub fn fxrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.cr0.intersects(Cr0::EM | Cr0::TS) {
        return Err(cpu.raise(Exception::new(Vector::DeviceNotAvailable)));
    }
    let linear = area(cpu, insn, (16, LEGACY), false)?;
    let mut image = [0; LEGACY];
    cpu.read_bytes(cpu.mmu.view, linear, &mut image)?;
    load_mxcsr(cpu, &image)?;
    if !is_wide(insn) {
        narrow_pointers(&mut image);
    }
    load(cpu, Component::X87, Some(&image[Component::X87.offset()..]));
    if cpu.cr4.contains(Cr4::OSFXSR) {
        load(cpu, Component::Sse, Some(&image[Component::Sse.offset()..]));
    }
    Ok(())
}

fn load_mxcsr(cpu: &mut Cpu, image: &[u8]) -> Result<(), Stop> {
    let value = bytes_at(image, MXCSR.start) as u32;
    cpu.vector.set_mxcsr(value).map_err(|_| cpu.gp0())
}

/// The components that EDX:EAX and XCR0 name both.
fn requested(cpu: &Cpu) -> u64 {
    let mask = cpu.registers.get(2) << 32 | cpu.registers.get(0) & 0xffff_ffff;
    mask & cpu.xcr0
}

/// Where the bytes of an XSAVE area within `range` of it lie. Their offset goes round as addresses of its size do.
fn xsave_area(cpu: &mut Cpu, insn: &Insn, range: Range<usize>, write: bool) -> Result<u64, Stop> {
    check_available(cpu, !cpu.cr4.contains(Cr4::OSXSAVE))?;
    let at = Insn { disp: insn.disp.wrapping_add(range.start as u64), ..*insn };
    area(cpu, &at, (64, range.len()), write)
}

/// XSAVE.
pub fn xsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let wanted = requested(cpu);
    save_standard(cpu, insn, wanted, wanted)
}

/// XSAVEOPT: like XSAVE, but components in their initial configuration are not written.
pub fn xsaveopt(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let wanted = requested(cpu);
    let used = in_use(cpu);
    save_standard(cpu, insn, wanted, wanted & used)
}

/// XINUSE, where MXCSR that is not at its default counts as SSE.
fn in_use(cpu: &Cpu) -> u64 {
    cpu.vector.in_use().bits() | if cpu.vector.mxcsr() != 0x1f80 { Xcr0::SSE.bits() } else { 0 }
}

fn save_standard(cpu: &mut Cpu, insn: &Insn, wanted: u64, written: u64) -> Result<(), Stop> {
    let len = standard_len(wanted);
    let first = legacy_start(wanted);
    let linear = xsave_area(cpu, insn, first..len, true)?;
    let mut image = [0; LARGEST];
    let (x87, sse, avx) = (Xcr0::X87.bits(), Xcr0::SSE.bits(), Xcr0::AVX.bits());
    cpu.probe_write(cpu.mmu.view, linear, len - first)?;
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[first..len])?;
    let legacy =
        Legacy { x87: written & x87 != 0, sse: written & sse != 0, mxcsr: wanted & (sse | avx) != 0 };
    save_legacy(cpu, insn, &mut image, legacy);
    for component in EXTENSIONS.iter().filter(|c| written & c.bit().bits() != 0) {
        save(cpu, *component, &mut image[component.offset()..]);
    }
    let kept = bytes_at(&image, LEGACY) & !wanted;
    // Other code than 64-bit code has no ZMM16 to ZMM31: they do not count as in use.
    let unreachable = if cpu.mode.is_64() { Xcr0::empty() } else { Xcr0::HI16_ZMM };
    let bitmap = kept | wanted & (cpu.vector.in_use() - unreachable).bits();
    image[LEGACY..LEGACY + 8].copy_from_slice(&bitmap.to_le_bytes());
    cpu.write_bytes(cpu.mmu.view, linear, &image[first..len])
}

/// Where an area begins to be accessed: the legacy region is left alone where nothing of it is wanted.
fn legacy_start(wanted: u64) -> usize {
    if wanted & (Xcr0::X87 | Xcr0::SSE | Xcr0::AVX).bits() == 0 { LEGACY } else { 0 }
}

/// Bytes that a standard area with these components takes.
fn standard_len(components: u64) -> usize {
    EXTENSIONS
        .iter()
        .filter(|c| components & c.bit().bits() != 0)
        .map(|c| c.offset() + c.size())
        .max()
        .unwrap_or(EXTENDED)
}

/// Where each of these extensions stands in a compacted area.
fn compacted(components: u64) -> impl Iterator<Item = (Component, usize)> {
    let mut next = EXTENDED;
    EXTENSIONS.into_iter().filter(move |c| components & c.bit().bits() != 0).map(move |component| {
        let at = next;
        next += component.size();
        (component, at)
    })
}

/// Bytes that a compacted area with these components takes.
fn compacted_len(components: u64) -> usize {
    compacted(components).last().map_or(EXTENDED, |(component, at)| at + component.size())
}

/// XSAVEC.
pub fn xsavec(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = xsave_area(cpu, insn, 0..EXTENDED, true)?;
    save_compacted(cpu, insn, linear)
}

/// XSAVES: like XSAVEC, with the states that IA32_XSS enables; there are none of these.
pub fn xsaves(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check_supervisor(cpu)?;
    let linear = xsave_area(cpu, insn, 0..EXTENDED, true)?;
    save_compacted(cpu, insn, linear)
}

/// XSAVES and XRSTORS are the kernel's, and undefined for all where there is no XSAVE.
fn check_supervisor(cpu: &mut Cpu) -> Result<(), Stop> {
    check_available(cpu, !cpu.cr4.contains(Cr4::OSXSAVE))?;
    if cpu.cpl() != 0 { Err(cpu.gp0()) } else { Ok(()) }
}

fn save_compacted(cpu: &mut Cpu, insn: &Insn, linear: u64) -> Result<(), Stop> {
    let wanted = requested(cpu);
    let written = wanted & in_use(cpu);
    let view = cpu.mmu.view;
    cpu.probe_write(view, linear, compacted_len(wanted))?;
    let (x87, sse) = (written & Xcr0::X87.bits() != 0, written & Xcr0::SSE.bits() != 0);
    if x87 || sse {
        let mut image = [0; AVAILABLE];
        cpu.read_bytes(view, linear, &mut image)?;
        save_legacy(cpu, insn, &mut image, Legacy { x87, sse, mxcsr: sse });
        cpu.write_bytes(view, linear, &image)?;
    }
    for (component, at) in compacted(wanted).filter(|(c, _)| written & c.bit().bits() != 0) {
        let (at, mut bytes) = (linear.wrapping_add(at as u64), [0; LARGEST_COMPONENT]);
        let bytes = &mut bytes[..component.size()];
        if !out_of_reach(cpu, component).is_empty() {
            cpu.read_bytes(view, at, bytes)?;
        }
        save(cpu, component, bytes);
        cpu.write_bytes(view, at, bytes)?;
    }
    let header = [written, wanted | COMPACTED].map(u64::to_le_bytes);
    cpu.write_bytes(view, linear.wrapping_add(LEGACY as u64), header.as_flattened())
}

/// XRSTOR, from either form.
pub fn xrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let len = standard_len(requested(cpu));
    let first = legacy_start(requested(cpu));
    let linear = xsave_area(cpu, insn, first..len, false)?;
    restore_area(cpu, insn, (linear, first), false)
}

/// XRSTORS, from the compacted form alone.
pub fn xrstors(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    check_supervisor(cpu)?;
    let linear = xsave_area(cpu, insn, 0..EXTENDED, false)?;
    restore_area(cpu, insn, (linear, 0), true)
}

/// Loads an area from `first` on, which is at `linear`.
fn restore_area(
    cpu: &mut Cpu,
    insn: &Insn,
    (linear, first): (u64, usize),
    compact_only: bool,
) -> Result<(), Stop> {
    let mut image = [0; LARGEST];
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[first..EXTENDED])?;
    let (present, layout) = (bytes_at(&image, LEGACY), bytes_at(&image, LEGACY + 8));
    let compact = layout & COMPACTED != 0;
    let valid = if compact {
        cpu.wires.model.has(crate::cpuid::feature::XSAVEC)
            && layout & !COMPACTED & !cpu.xcr0 == 0
            && present & !layout == 0
    } else {
        !compact_only && present & !cpu.xcr0 == 0 && layout == 0
    };
    let reserved = if compact { 16..64 } else { 8..24 };
    if !valid || image[LEGACY..EXTENDED][reserved].iter().any(|&b| b != 0) {
        return Err(cpu.gp0());
    }
    let wanted = requested(cpu);
    let len = if compact { compacted_len(layout) } else { standard_len(wanted & present) };
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[first..len])?;
    if !is_wide(insn) {
        narrow_pointers(&mut image);
    }
    restore(cpu, &image, wanted, present, if compact { Some(layout) } else { None })
}

fn restore(cpu: &mut Cpu, image: &[u8], wanted: u64, present: u64, layout: Option<u64>) -> Result<(), Stop> {
    let (sse, avx) = (Xcr0::SSE.bits(), Xcr0::AVX.bits());
    // The standard form loads MXCSR with SSE or AVX whatever XSTATE_BV says, the compacted one with SSE.
    match layout {
        None if wanted & (sse | avx) != 0 => load_mxcsr(cpu, image)?,
        Some(_) if wanted & sse != 0 && present & sse != 0 => load_mxcsr(cpu, image)?,
        Some(_) if wanted & sse != 0 => {
            let _ = cpu.vector.set_mxcsr(0x1f80);
        }
        _ => {}
    }
    for component in Component::ALL.into_iter().filter(|c| wanted & c.bit().bits() != 0) {
        let place = match layout {
            Some(layout) if EXTENSIONS.contains(&component) => {
                compacted(layout).find(|&(c, _)| c == component).map(|(_, at)| at)
            }
            _ => Some(component.offset()),
        };
        let here = place.filter(|_| present & component.bit().bits() != 0);
        load(cpu, component, here.and_then(|at| image.get(at..)));
    }
    cpu.update_keys();
    Ok(())
}

#[cfg(test)]
mod tests;
