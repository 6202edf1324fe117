//! FXSAVE, XSAVE and their kin. SDM vol. 1, *Managing State Using the XSAVE Feature Set*.

use x86::{Cr0, Cr4, Exception, Vector, Xcr0};

use crate::cpu::Cpu;
use crate::insn::{Insn, Stop};
use crate::native::{Component, VectorRegisters};

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

/// The operand's linear address, aligned.
fn area(cpu: &mut Cpu, insn: &Insn, alignment: u64, write: bool) -> Result<u64, Stop> {
    let linear = if write { cpu.linear::<true>(insn, 1)? } else { cpu.linear::<false>(insn, 1)? };
    if linear % alignment != 0 {
        return Err(cpu.gp0());
    }
    Ok(linear)
}

fn bytes_at(area: &[u8], at: usize) -> u64 {
    area.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// Whether XMM8 to XMM15 are saved: only in 64-bit mode.
fn legacy_len(cpu: &Cpu) -> usize {
    if cpu.mode.is_64() { AVAILABLE } else { 288 }
}

/// FXSAVE and FXSAVE64.
pub fn fxsave(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.cr0.intersects(Cr0::EM | Cr0::TS) {
        return Err(cpu.raise(Exception::new(Vector::DeviceNotAvailable)));
    }
    let linear = area(cpu, insn, 16, true)?;
    let mut image = [0; LEGACY];
    cpu.read_bytes(cpu.mmu.view, linear, &mut image)?;
    let sse = cpu.cr4.contains(Cr4::OSFXSR);
    save_legacy(cpu, &mut image, true, sse, true);
    cpu.write_bytes(cpu.mmu.view, linear, &image[..AVAILABLE])
}

fn save_legacy(cpu: &Cpu, image: &mut [u8], x87: bool, sse: bool, mxcsr: bool) {
    if x87 {
        cpu.vector.save_component(Component::X87, &mut image[Component::X87.offset()..]);
    }
    if mxcsr {
        image[MXCSR].copy_from_slice(&cpu.vector.mxcsr_field());
    }
    if sse {
        let upper: [u8; 128] = image[288..AVAILABLE].try_into().unwrap_or([0; 128]);
        cpu.vector.save_component(Component::Sse, &mut image[Component::Sse.offset()..]);
        if legacy_len(cpu) < AVAILABLE {
            image[288..AVAILABLE].copy_from_slice(&upper);
        }
    }
}

/// FXRSTOR and FXRSTOR64.
pub fn fxrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    if cpu.cr0.intersects(Cr0::EM | Cr0::TS) {
        return Err(cpu.raise(Exception::new(Vector::DeviceNotAvailable)));
    }
    let linear = area(cpu, insn, 16, false)?;
    let mut image = [0; LEGACY];
    cpu.read_bytes(cpu.mmu.view, linear, &mut image)?;
    load_mxcsr(cpu, &image)?;
    cpu.vector.load_component(Component::X87, &image[Component::X87.offset()..]);
    if cpu.cr4.contains(Cr4::OSFXSR) {
        load_xmm(cpu, &image);
    }
    Ok(())
}

fn load_mxcsr(cpu: &mut Cpu, image: &[u8]) -> Result<(), Stop> {
    let value = bytes_at(image, MXCSR.start) as u32;
    cpu.vector.set_mxcsr(value).map_err(|_| cpu.gp0())
}

fn load_xmm(cpu: &mut Cpu, image: &[u8]) {
    let kept: Vec<[u8; 16]> = cpu.vector.zmm[8..16].iter().filter_map(|z| z.first_chunk().copied()).collect();
    cpu.vector.load_component(Component::Sse, &image[Component::Sse.offset()..]);
    if legacy_len(cpu) < AVAILABLE {
        for (zmm, old) in cpu.vector.zmm[8..16].iter_mut().zip(&kept) {
            zmm[..16].copy_from_slice(old);
        }
    }
}

/// The components that EDX:EAX and XCR0 name both.
fn requested(cpu: &Cpu) -> u64 {
    let mask = cpu.registers.get(2) << 32 | cpu.registers.get(0) & 0xffff_ffff;
    mask & cpu.xcr0
}

fn xsave_area(cpu: &mut Cpu, insn: &Insn, write: bool) -> Result<u64, Stop> {
    check_available(cpu, !cpu.cr4.contains(Cr4::OSXSAVE))?;
    area(cpu, insn, 64, write)
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
    let linear = xsave_area(cpu, insn, true)?;
    let mut image = [0; LARGEST];
    let len = standard_len(wanted);
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[..len])?;
    let (x87, sse, avx) = (Xcr0::X87.bits(), Xcr0::SSE.bits(), Xcr0::AVX.bits());
    save_legacy(cpu, &mut image, written & x87 != 0, written & sse != 0, wanted & (sse | avx) != 0);
    for component in EXTENSIONS.iter().filter(|c| written & c.bit().bits() != 0) {
        cpu.vector.save_component(*component, &mut image[component.offset()..]);
    }
    let kept = bytes_at(&image, LEGACY) & !wanted;
    let bitmap = kept | wanted & cpu.vector.in_use().bits();
    image[LEGACY..LEGACY + 8].copy_from_slice(&bitmap.to_le_bytes());
    cpu.write_bytes(cpu.mmu.view, linear, &image[..len])
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

/// Where each extension stands in a compacted area, and the area's length.
fn compacted(components: u64) -> (Vec<(Component, usize)>, usize) {
    let mut at = EXTENDED;
    let mut places = Vec::new();
    for component in EXTENSIONS.into_iter().filter(|c| components & c.bit().bits() != 0) {
        places.push((component, at));
        at += component.size();
    }
    (places, at)
}

/// XSAVEC.
pub fn xsavec(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = xsave_area(cpu, insn, true)?;
    let wanted = requested(cpu);
    let written = wanted & in_use(cpu);
    let (places, len) = compacted(wanted);
    let mut image = [0; LARGEST];
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[..len])?;
    let sse = Xcr0::SSE.bits();
    save_legacy(cpu, &mut image, written & Xcr0::X87.bits() != 0, written & sse != 0, written & sse != 0);
    for (component, at) in places.into_iter().filter(|(c, _)| written & c.bit().bits() != 0) {
        cpu.vector.save_component(component, &mut image[at..]);
    }
    image[LEGACY..LEGACY + 8].copy_from_slice(&written.to_le_bytes());
    image[LEGACY + 8..LEGACY + 16].copy_from_slice(&(wanted | COMPACTED).to_le_bytes());
    cpu.write_bytes(cpu.mmu.view, linear, &image[..len])
}

/// XRSTOR, from either form.
pub fn xrstor(cpu: &mut Cpu, insn: &Insn) -> Result<(), Stop> {
    let linear = xsave_area(cpu, insn, false)?;
    let mut image = [0; LARGEST];
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[..EXTENDED])?;
    let (present, layout) = (bytes_at(&image, LEGACY), bytes_at(&image, LEGACY + 8));
    let compact = layout & COMPACTED != 0;
    let valid = if compact {
        cpu.wires.model.has(crate::cpuid::feature::XSAVEC)
            && layout & !COMPACTED & !cpu.xcr0 == 0
            && present & !layout == 0
    } else {
        present & !cpu.xcr0 == 0 && layout == 0
    };
    let reserved = if compact { 16..64 } else { 8..24 };
    if !valid || image[LEGACY..EXTENDED][reserved].iter().any(|&b| b != 0) {
        return Err(cpu.gp0());
    }
    let wanted = requested(cpu);
    let len = if compact { compacted(layout).1 } else { standard_len(wanted & present) };
    cpu.read_bytes(cpu.mmu.view, linear, &mut image[..len])?;
    restore(cpu, &image, wanted, present, if compact { Some(layout) } else { None })
}

fn restore(cpu: &mut Cpu, image: &[u8], wanted: u64, present: u64, layout: Option<u64>) -> Result<(), Stop> {
    let (x87, sse, avx) = (Xcr0::X87.bits(), Xcr0::SSE.bits(), Xcr0::AVX.bits());
    // The standard form loads MXCSR with SSE or AVX whatever XSTATE_BV says, the compacted one with SSE.
    match layout {
        None if wanted & (sse | avx) != 0 => load_mxcsr(cpu, image)?,
        Some(_) if wanted & sse != 0 && present & sse != 0 => load_mxcsr(cpu, image)?,
        Some(_) if wanted & sse != 0 => {
            let _ = cpu.vector.set_mxcsr(0x1f80);
        }
        _ => {}
    }
    load_or_init(
        &mut cpu.vector,
        Component::X87,
        image,
        wanted & x87 != 0,
        present & x87 != 0,
        Component::X87.offset(),
    );
    match (wanted & sse != 0, present & sse != 0) {
        (true, true) => load_xmm(cpu, image),
        (true, false) => cpu.vector.init_component(Component::Sse),
        _ => {}
    }
    let places = match layout {
        Some(layout) => compacted(layout).0,
        None => EXTENSIONS.into_iter().map(|c| (c, c.offset())).collect(),
    };
    for component in EXTENSIONS {
        let bit = component.bit().bits();
        let place = places.iter().find(|(c, _)| *c == component).map(|&(_, at)| at);
        let (from, here) = (place.unwrap_or(0), present & bit != 0 && place.is_some());
        load_or_init(&mut cpu.vector, component, image, wanted & bit != 0, here, from);
    }
    cpu.update_keys();
    Ok(())
}

fn load_or_init(
    vector: &mut VectorRegisters,
    component: Component,
    image: &[u8],
    wanted: bool,
    present: bool,
    at: usize,
) {
    match (wanted, present, image.get(at..)) {
        (true, true, Some(bytes)) => vector.load_component(component, bytes),
        (true, ..) => vector.init_component(component),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
