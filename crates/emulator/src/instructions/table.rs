//! The rows.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::ExitReason as Reason;

use super::shape::{Form, Shape};
use super::*;
use crate::native::is_listed;

/// The row of an instruction.
pub fn lookup(instruction: &Instruction) -> Row {
    let row = by_mnemonic(instruction.mnemonic());
    match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Push | Mnemonic::Pop => special_register(instruction).unwrap_or(row),
        // Two mnemonics stand for a string instruction and for one of SSE2.
        Mnemonic::Movsd | Mnemonic::Cmpsd if !instruction.is_string_instruction() => {
            native_or_undefined(instruction)
        }
        Mnemonic::Jmp | Mnemonic::Call => far_branch(instruction).unwrap_or(row),
        _ if matches!(row.kind, Kind::Undefined) => native_or_undefined(instruction),
        _ => row,
    }
}

fn native_or_undefined(instruction: &Instruction) -> Row {
    if is_listed(instruction) { native() } else { undefined_row() }
}

/// MOV, PUSH and POP of segment, control and debug registers.
fn special_register(instruction: &Instruction) -> Option<Row> {
    let register = |n: u32| match (n < instruction.op_count()).then(|| instruction.op_kind(n)) {
        Some(OpKind::Register) => instruction.op_register(n),
        _ => Register::None,
    };
    let (first, second) = (register(0), register(1));
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    Some(match instruction.mnemonic() {
        Mnemonic::Push if first.is_segment_register() => handler(segment::push_segment),
        Mnemonic::Pop if first.is_segment_register() => handler(segment::pop_segment).ends_block(),
        Mnemonic::Mov if first.is_segment_register() && memory => {
            handler(segment::mov_to_segment_memory).ends_block()
        }
        Mnemonic::Mov if first.is_segment_register() => {
            handler(segment::mov_to_segment_register).ends_block()
        }
        Mnemonic::Mov if second.is_segment_register() && memory => handler(segment::mov_from_segment_memory),
        Mnemonic::Mov if second.is_segment_register() => handler(segment::mov_from_segment_register),
        Mnemonic::Mov if first.is_cr() => exiting(control::mov_to_cr, Reason::CrAccess),
        Mnemonic::Mov if second.is_cr() => exiting(control::mov_from_cr, Reason::CrAccess),
        Mnemonic::Mov if first.is_dr() => exiting(control::mov_to_dr, Reason::DrAccess),
        Mnemonic::Mov if second.is_dr() => exiting(control::mov_from_dr, Reason::DrAccess),
        _ => return None,
    })
}

/// A privileged instruction that a hardware guest may exit for.
const fn exiting(run: Handler, reason: Reason) -> Row {
    handler(run).privileged().exits(reason).ends_block()
}

fn far_branch(instruction: &Instruction) -> Option<Row> {
    let indirect = instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect();
    let direct = instruction.is_jmp_far() || instruction.is_call_far();
    let jump = instruction.mnemonic() == Mnemonic::Jmp;
    Some(match (jump, direct, indirect) {
        (true, true, _) => handler(far::jmp_far_pointer).ends_block(),
        (true, _, true) => handler(far::jmp_far_memory).ends_block(),
        (false, true, _) => handler(far::call_far_pointer).ends_block(),
        (false, _, true) => handler(far::call_far_memory).ends_block(),
        _ => return None,
    })
}

/// A handler for a register operand and one for memory.
macro_rules! register_or_memory {
    ($register:path, $memory:path) => {
        select(|shape: &Shape| {
            Some(match shape.form {
                Form::Mem | Form::RegMem | Form::MemReg => $memory as Handler,
                _ => $register,
            })
        })
    };
}

/// The row of a mnemonic, as far as that tells it.
#[allow(clippy::too_many_lines)] // A table.
pub fn by_mnemonic(mnemonic: Mnemonic) -> Row {
    use Mnemonic::*;
    match mnemonic {
        // Integer arithmetic and logic.
        Add => select(arithmetic::binary::<arithmetic::Add>),
        Adc => select(arithmetic::binary::<arithmetic::Adc>),
        Sub => select(arithmetic::binary::<arithmetic::Sub>),
        Sbb => select(arithmetic::binary::<arithmetic::Sbb>),
        Cmp => select(arithmetic::binary::<arithmetic::Cmp>),
        And => select(arithmetic::binary::<arithmetic::And>),
        Or => select(arithmetic::binary::<arithmetic::Or>),
        Xor => select(arithmetic::binary::<arithmetic::Xor>),
        Test => select(arithmetic::binary::<arithmetic::Test>),
        Inc => select(arithmetic::unary::<arithmetic::Inc>),
        Dec => select(arithmetic::unary::<arithmetic::Dec>),
        Neg => select(arithmetic::unary::<arithmetic::Neg>),
        Not => select(arithmetic::unary::<arithmetic::Not>),
        Mul => select(multiply::accumulate::<multiply::Mul>),
        Imul => select(multiply::imul),
        Div => select(multiply::accumulate::<multiply::Div>),
        Idiv => select(multiply::accumulate::<multiply::Idiv>),
        Shl | Sal => select(shift::shift::<shift::Shl>),
        Shr => select(shift::shift::<shift::Shr>),
        Sar => select(shift::shift::<shift::Sar>),
        Rol => select(shift::shift::<shift::Rol>),
        Ror => select(shift::shift::<shift::Ror>),
        Rcl => select(shift::shift::<shift::Rcl>),
        Rcr => select(shift::shift::<shift::Rcr>),
        Shld => select(shift::shld),
        Shrd => select(shift::shrd),
        Bt => select(bit::test::<bit::Keep>),
        Bts => select(bit::test::<bit::Set>),
        Btr => select(bit::test::<bit::Reset>),
        Btc => select(bit::test::<bit::Complement>),
        Bsf => select(bit::bsf),
        Bsr => select(bit::bsr),
        Daa => handler(flag::daa),
        Das => handler(flag::das),
        Aaa => handler(flag::aaa),
        Aas => handler(flag::aas),
        Aam => handler(flag::aam),
        Aad => handler(flag::aad),

        // Moves.
        Mov => select(data::mov),
        Movzx => select(data::movzx),
        Movsx | Movsxd => select(data::movsx),
        Lea => select(data::lea),
        Xchg => select(data::xchg),
        Xadd => select(data::xadd),
        Cmpxchg => select(data::cmpxchg),
        Cmpxchg8b => handler(data::cmpxchg8b),
        Cmpxchg16b => handler(data::cmpxchg16b),
        Bswap => handler(data::bswap),
        Movdiri => handler(direct_store::movdiri),
        Movdir64b => handler(direct_store::movdir64b),
        Xlatb => handler(data::xlatb),
        Cbw | Cwde | Cdqe => handler(data::extend_accumulator),
        Cwd | Cdq | Cqo => handler(data::extend_into_rdx),
        Cmovo => select(data::cmov::<0>),
        Cmovno => select(data::cmov::<1>),
        Cmovb => select(data::cmov::<2>),
        Cmovae => select(data::cmov::<3>),
        Cmove => select(data::cmov::<4>),
        Cmovne => select(data::cmov::<5>),
        Cmovbe => select(data::cmov::<6>),
        Cmova => select(data::cmov::<7>),
        Cmovs => select(data::cmov::<8>),
        Cmovns => select(data::cmov::<9>),
        Cmovp => select(data::cmov::<10>),
        Cmovnp => select(data::cmov::<11>),
        Cmovl => select(data::cmov::<12>),
        Cmovge => select(data::cmov::<13>),
        Cmovle => select(data::cmov::<14>),
        Cmovg => select(data::cmov::<15>),
        Seto => select(data::set::<0>),
        Setno => select(data::set::<1>),
        Setb => select(data::set::<2>),
        Setae => select(data::set::<3>),
        Sete => select(data::set::<4>),
        Setne => select(data::set::<5>),
        Setbe => select(data::set::<6>),
        Seta => select(data::set::<7>),
        Sets => select(data::set::<8>),
        Setns => select(data::set::<9>),
        Setp => select(data::set::<10>),
        Setnp => select(data::set::<11>),
        Setl => select(data::set::<12>),
        Setge => select(data::set::<13>),
        Setle => select(data::set::<14>),
        Setg => select(data::set::<15>),

        // Flags.
        Clc => handler(flag::clc),
        Stc => handler(flag::stc),
        Cmc => handler(flag::cmc),
        Cld => handler(flag::cld),
        Std => handler(flag::std_),
        Lahf => handler(flag::lahf),
        Sahf => handler(flag::sahf),
        Salc => handler(flag::salc),
        Pushf | Pushfd | Pushfq => handler(control::pushf),
        Popf | Popfd | Popfq => handler(control::popf).ends_block(),
        Cli => handler(control::cli).ends_block(),
        Sti => handler(control::sti).ends_block(),
        Clac => handler(control::clac).ends_block(),
        Stac => handler(control::stac).ends_block(),

        // The stack and near control flow.
        Push => select(stack::push),
        Pop => select(stack::pop),
        Pusha | Pushad => handler(stack::pusha),
        Popa | Popad => handler(stack::popa),
        Enter => handler(stack::enter),
        Leave => handler(stack::leave),
        Jmp => select(control_flow::jmp).ends_block(),
        Call => select(control_flow::call).ends_block(),
        Ret => select(control_flow::ret).ends_block(),
        Jo => handler(control_flow::jcc::<0>).ends_block(),
        Jno => handler(control_flow::jcc::<1>).ends_block(),
        Jb => handler(control_flow::jcc::<2>).ends_block(),
        Jae => handler(control_flow::jcc::<3>).ends_block(),
        Je => handler(control_flow::jcc::<4>).ends_block(),
        Jne => handler(control_flow::jcc::<5>).ends_block(),
        Jbe => handler(control_flow::jcc::<6>).ends_block(),
        Ja => handler(control_flow::jcc::<7>).ends_block(),
        Js => handler(control_flow::jcc::<8>).ends_block(),
        Jns => handler(control_flow::jcc::<9>).ends_block(),
        Jp => handler(control_flow::jcc::<10>).ends_block(),
        Jnp => handler(control_flow::jcc::<11>).ends_block(),
        Jl => handler(control_flow::jcc::<12>).ends_block(),
        Jge => handler(control_flow::jcc::<13>).ends_block(),
        Jle => handler(control_flow::jcc::<14>).ends_block(),
        Jg => handler(control_flow::jcc::<15>).ends_block(),
        Bound => handler(control_flow::bound),
        Jcxz | Jecxz | Jrcxz => handler(control_flow::jcxz).ends_block(),
        Loop => handler(control_flow::loop_).ends_block(),
        Loope => handler(control_flow::loope).ends_block(),
        Loopne => handler(control_flow::loopne).ends_block(),

        // Strings and ports.
        Movsb | Movsw | Movsd | Movsq => select(string::movs),
        Stosb | Stosw | Stosd | Stosq => select(string::stos),
        Lodsb | Lodsw | Lodsd | Lodsq => select(string::lods),
        Scasb | Scasw | Scasd | Scasq => select(string::scas),
        Cmpsb | Cmpsw | Cmpsd | Cmpsq => select(string::cmps),
        Insb | Insw | Insd => select(string::ins),
        Outsb | Outsw | Outsd => select(string::outs),
        In => select(io::in_),
        Out => select(io::out).ends_block(),

        // Far control flow, interrupts, system calls.
        Retf => handler(far::ret_far).ends_block(),
        Int => handler(event::int_n).ends_block(),
        Int3 => handler(event::int3).ends_block(),
        Into => handler(event::into).ends_block(),
        Int1 => handler(event::int1).ends_block(),
        Iret | Iretd | Iretq => handler(event::iret).ends_block(),
        Syscall => handler(syscall::syscall).ends_block(),
        Sysret | Sysretq => handler(syscall::sysret).ends_block(),
        Sysenter => handler(syscall::sysenter).ends_block(),
        Sysexit | Sysexitq => handler(syscall::sysexit).ends_block(),
        Ud0 | Ud1 | Ud2 => undefined_row(),

        // Segments and system tables.
        Lds => handler(segment::lds).ends_block(),
        Les => handler(segment::les).ends_block(),
        Lfs => handler(segment::lfs).ends_block(),
        Lgs => handler(segment::lgs).ends_block(),
        Lss => handler(segment::lss).ends_block(),
        Lgdt => handler(segment::lgdt).privileged().ends_block(),
        Lidt => handler(segment::lidt).privileged().ends_block(),
        Sgdt => handler(segment::sgdt),
        Sidt => handler(segment::sidt),
        Lldt => register_or_memory!(segment::lldt_register, segment::lldt_memory).privileged().ends_block(),
        Ltr => register_or_memory!(segment::ltr_register, segment::ltr_memory).privileged().ends_block(),
        Sldt => register_or_memory!(segment::sldt_register, segment::sldt_memory),
        Str => register_or_memory!(segment::str_register, segment::str_memory),
        Verr => register_or_memory!(segment::verr_register, segment::verr_memory),
        Verw => register_or_memory!(segment::verw_register, segment::verw_memory),
        Lar => register_or_memory!(segment::lar_register, segment::lar_memory),
        Lsl => register_or_memory!(segment::lsl_register, segment::lsl_memory),
        Arpl => register_or_memory!(segment::arpl_register, segment::arpl_memory),
        Swapgs => handler(segment::swapgs).privileged(),
        Rdfsbase => handler(segment::rdfsbase),
        Rdgsbase => handler(segment::rdgsbase),
        Wrfsbase => handler(segment::wrfsbase),
        Wrgsbase => handler(segment::wrgsbase),

        // Control registers, time, the processor itself.
        Clts => handler(control::clts).privileged().ends_block(),
        Lmsw => register_or_memory!(control::lmsw_register, control::lmsw_memory).privileged().ends_block(),
        Smsw => register_or_memory!(control::smsw_register, control::smsw_memory),
        Invlpg => exiting(control::invlpg, Reason::Invlpg),
        Invpcid => exiting(control::invpcid, Reason::Invpcid),
        Xgetbv => handler(control::xgetbv),
        Xsetbv => exiting(control::xsetbv, Reason::Xsetbv),
        Invd => exiting(control::invd, Reason::Invd),
        Wbinvd | Wbnoinvd => exiting(control::wbinvd, Reason::Wbinvd),
        Hlt => handler(control::hlt).privileged().ends_block(),
        Pause => handler(control::pause).ends_block(),
        Rdtsc => handler(control::rdtsc),
        Rdtscp => handler(control::rdtscp),
        Rdpid => handler(control::rdpid),
        Rdpmc => handler(crate::pmu::rdpmc),
        Rdpkru => handler(control::rdpkru),
        Wrpkru => handler(control::wrpkru),
        Rdrand => handler(processor::rdrand),
        Rdseed => handler(processor::rdseed),
        Cpuid => handler(processor::cpuid).exits(Reason::Cpuid).ends_block(),
        Vmcall => handler(control::vmcall).exits(Reason::Vmcall).ends_block(),
        Rdmsr => exiting(msr::rdmsr, Reason::MsrRead),
        Wrmsr => exiting(msr::wrmsr, Reason::MsrWrite),

        // State save.
        Fxsave | Fxsave64 => handler(xsave::fxsave),
        Fxrstor | Fxrstor64 => handler(xsave::fxrstor),
        Xsave | Xsave64 => handler(xsave::xsave),
        Xsavec | Xsavec64 => handler(xsave::xsavec),
        Xsaveopt | Xsaveopt64 => handler(xsave::xsaveopt),
        Xrstor | Xrstor64 => handler(xsave::xrstor),
        Xsaves | Xsaves64 => handler(xsave::xsaves),
        Xrstors | Xrstors64 => handler(xsave::xrstors),

        // Vectors of addresses.
        Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd | Vpgatherdd | Vpgatherdq | Vpgatherqd
        | Vpgatherqq => handler(gather::gather),
        Vscatterdps | Vscatterdpd | Vscatterqps | Vscatterqpd | Vpscatterdd | Vpscatterdq | Vpscatterqd
        | Vpscatterqq => handler(gather::scatter),

        // Hints and order.
        Nop | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Reservednop | Prefetchnta | Prefetcht0 | Prefetcht1
        | Prefetcht2 | Prefetchw | Prefetchwt1 | Prefetch | Prefetchit0 | Prefetchit1 | Cldemote => {
            handler(flag::nop)
        }
        Clflush | Clflushopt | Clwb => handler(data::flush_line),
        Serialize => handler(flag::nop).ends_block(),
        Lfence | Mfence | Sfence => handler(flag::fence),
        _ => undefined_row(),
    }
}
