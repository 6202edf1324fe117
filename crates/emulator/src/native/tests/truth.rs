//! Executes an instruction plainly: the whole state goes into the processor, then the instruction, then the whole
//! state comes out.

use std::arch::x86_64::_xgetbv;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use engine::{HostXsave, VectorState, XSAVE_AREA_SIZE};
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

use crate::native::VectorRegisters;
use crate::native::code_memory::CodeMemory;

/// What an instruction sees and changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    pub gprs: [u64; 16],
    pub rflags: u64,
    pub vector: VectorRegisters,
    pub memory: [u8; OPERAND],
}

/// Bytes of the buffer around the memory operand.
pub const OPERAND: usize = 128;

const PAGE: usize = 4096;
const STATE_IN: usize = 0;
const STATE_OUT: usize = PAGE;
const GPRS_IN: usize = 2 * PAGE;
const GPRS_OUT: usize = GPRS_IN + 128;
const FLAGS_IN: usize = GPRS_OUT + 128;
const FLAGS_OUT: usize = FLAGS_IN + 8;
const HOST_RSP: usize = FLAGS_IN + 16;
const HOST_MXCSR: usize = FLAGS_IN + 24;
const MEMORY: usize = 4 * PAGE - OPERAND;
const NEXT: usize = 4 * PAGE;
const DATA: usize = 5 * PAGE;
/// The place of the tested instruction in [`Truth::listing`].
const TESTED: usize = 28;
const CODE: usize = 1 << 20;

static FAULT_AT: AtomicU64 = AtomicU64::new(0);
static RESUME_AT: AtomicU64 = AtomicU64::new(0);
static SIGNAL: AtomicI32 = AtomicI32::new(0);
/// Held while an instruction may fault: the three above are for one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The tested instruction is left behind; any other fault is as fatal as it would be without us.
extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a signal handler its context.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let rip = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    if *rip as u64 == FAULT_AT.load(Ordering::SeqCst) {
        *rip = RESUME_AT.load(Ordering::SeqCst) as i64;
        SIGNAL.store(signal, Ordering::SeqCst);
    } else {
        // SAFETY: resets a signal's disposition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// On the alternate stack that every thread of Rust has: RSP is the guest's.
fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS] {
            // SAFETY: a zeroed action is a valid one.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: the handler has the type that SA_SIGINFO asks for.
            assert_eq!(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }, 0);
        }
    });
}

/// Code and data near each other, so that the code reaches the data relative to RIP and needs no register.
pub struct Truth {
    code: CodeMemory,
    data: *mut u8,
    /// The state components that the host has.
    components: u32,
}

impl Truth {
    pub fn new() -> Self {
        let code = CodeMemory::new(CODE).unwrap();
        let near = code.address(0).wrapping_add(64 << 20).cast_mut().cast();
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping; the address is a hint.
        let data = unsafe { libc::mmap(near, DATA, protection, flags, -1, 0) }.cast::<u8>();
        assert!((data as usize).abs_diff(code.address(0) as usize) < 1 << 30, "no data near the code");
        // SAFETY: every processor with AVX-512 or AVX has it, and tests run on no other.
        let enabled = unsafe { _xgetbv(0) };
        Self { code, data, components: enabled as u32 & 0xe7 }
    }

    /// Where the memory operand lies.
    pub fn address(&self) -> u64 {
        self.data as u64 + MEMORY as u64
    }

    /// An address from which the encoder can reach the memory operand.
    pub fn rip(&self) -> u64 {
        self.code.address(0) as u64
    }

    /// Takes a page's rights away, or gives them back: the one after the memory operand's buffer.
    pub fn protect_next_page(&self, protection: i32) {
        // SAFETY: a page of the data mapping that nothing else uses.
        assert_eq!(unsafe { libc::mprotect(self.data.add(NEXT).cast(), PAGE, protection) }, 0);
    }

    /// The first address that [`Truth::protect_next_page`] is about.
    pub fn next_page(&self) -> u64 {
        self.data as u64 + NEXT as u64
    }

    /// Runs one instruction: the signal that it raised, and the state after it.
    pub fn run(&mut self, instruction: &Instruction, before: &Machine) -> (Option<i32>, Machine) {
        self.put(STATE_IN, &HostXsave::get().to_host(&before.vector.to_state().0));
        self.put(STATE_OUT, &[0; XSAVE_AREA_SIZE]);
        self.put(GPRS_IN, &before.gprs.map(u64::to_le_bytes).concat());
        self.put(FLAGS_IN, &(before.rflags & 0x8d5 | 2).to_le_bytes());
        self.put(HOST_MXCSR, &0x1f80u32.to_le_bytes());
        self.put(MEMORY, &before.memory);
        let (code, start, fault) = self.assemble(instruction);
        let offset = self.code.push(&code).unwrap_or_else(|| {
            self.code.clear();
            self.code.push(&code).unwrap()
        });
        assert_eq!(self.code.address(offset) as u64, start);
        install_handler();
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        FAULT_AT.store(fault.0, Ordering::SeqCst);
        RESUME_AT.store(fault.1, Ordering::SeqCst);
        SIGNAL.store(0, Ordering::SeqCst);
        // SAFETY: code that keeps to this calling convention, for an instruction that only computes.
        unsafe { std::mem::transmute::<*const u8, extern "sysv64" fn()>(self.code.address(offset))() };
        FAULT_AT.store(0, Ordering::SeqCst);
        let signal = SIGNAL.load(Ordering::SeqCst);
        ((signal != 0).then_some(signal), self.collect())
    }

    fn collect(&self) -> Machine {
        let mut state = VectorState::default();
        *state.0 = HostXsave::get().from_host(&self.take::<XSAVE_AREA_SIZE>(STATE_OUT));
        state.0[6..24].fill(0); // opcode and pointers of the last x87 instruction
        let gprs = self.take::<128>(GPRS_OUT);
        Machine {
            gprs: std::array::from_fn(|i| u64::from_le_bytes(gprs[8 * i..8 * i + 8].try_into().unwrap())),
            rflags: u64::from_le_bytes(self.take(FLAGS_OUT)) & 0x8d5,
            vector: VectorRegisters::from_state(&state),
            memory: self.take(MEMORY),
        }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= DATA);
        // SAFETY: within the data mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.data.add(at), bytes.len()) };
    }

    fn take<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= DATA);
        // SAFETY: within the data mapping.
        unsafe { self.data.add(at).cast::<[u8; N]>().read_unaligned() }
    }

    fn data_at(&self, offset: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RIP, self.data as i64 + offset as i64)
    }

    /// The code, the address at which it must lie, and those of the instruction and of what comes after it.
    fn assemble(&mut self, instruction: &Instruction) -> (Vec<u8>, u64, (u64, u64)) {
        // A first piece of no length finds where the next one will lie.
        let mut start = self.code.push(&[]);
        if start.is_none_or(|start| start as usize + PAGE > CODE) {
            self.code.clear();
            start = self.code.push(&[]);
        }
        let start = self.code.address(start.unwrap()) as u64;
        let mut encoder = Encoder::new(64);
        let mut rip = start;
        let mut fault = (0, 0);
        for (i, listed) in self.listing(instruction).iter().enumerate() {
            let next = rip + encoder.encode(listed, rip).unwrap() as u64;
            if i == TESTED {
                fault = (rip, next);
            }
            rip = next;
        }
        (encoder.take_buffer(), start, fault)
    }

    fn listing(&self, instruction: &Instruction) -> Vec<Instruction> {
        const PRESERVED: [Register; 6] =
            [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
        let mut list = Vec::new();
        let mut add = |instruction: Result<Instruction, _>| list.push(instruction.unwrap());
        let at = |offset| self.data_at(offset);
        PRESERVED.iter().for_each(|&register| add(Instruction::with1(Code::Push_r64, register)));
        add(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, self.components));
        add(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, 0));
        add(Instruction::with1(Code::Xrstor64_mem, at(STATE_IN)));
        add(Instruction::with1(Code::Push_rm64, at(FLAGS_IN)));
        add(Ok(Instruction::with(Code::Popfq)));
        add(Instruction::with2(Code::Mov_rm64_r64, at(HOST_RSP), Register::RSP));
        for i in 0..16u32 {
            let from = at(GPRS_IN + 8 * i as usize);
            add(Instruction::with2(Code::Mov_r64_rm64, Register::RAX + i, from));
        }
        add(Ok(*instruction));
        for i in 0..16u32 {
            let to = at(GPRS_OUT + 8 * i as usize);
            add(Instruction::with2(Code::Mov_rm64_r64, to, Register::RAX + i));
        }
        add(Instruction::with2(Code::Mov_r64_rm64, Register::RSP, at(HOST_RSP)));
        add(Ok(Instruction::with(Code::Pushfq)));
        add(Instruction::with1(Code::Pop_rm64, at(FLAGS_OUT)));
        add(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, self.components));
        add(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, 0));
        add(Instruction::with1(Code::Xsave64_mem, at(STATE_OUT)));
        add(Ok(Instruction::with(Code::Fninit)));
        add(Instruction::with1(Code::Ldmxcsr_m32, at(HOST_MXCSR)));
        add(Ok(Instruction::with(Code::VEX_Vzeroupper)));
        PRESERVED.iter().rev().for_each(|&register| add(Instruction::with1(Code::Pop_r64, register)));
        add(Ok(Instruction::with(Code::Retnq)));
        list
    }
}

impl Drop for Truth {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped.
        unsafe { libc::munmap(self.data.cast(), DATA) };
    }
}
