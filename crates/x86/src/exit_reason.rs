//! Basic exit reasons. SDM vol. 3, appendix *VMX Basic Exit Reasons*.

macro_rules! exit_reasons {
    ($($variant:ident = $number:literal, $name:literal;)*) => {
        /// Why a guest left, in Intel's vocabulary, on every engine; the discriminant is the number in a VMCS.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum ExitReason { $($variant = $number,)* }

        impl ExitReason {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [ExitReason] = &[$(ExitReason::$variant,)*];

            /// The name as the ledger prints it.
            pub const fn name(self) -> &'static str {
                match self { $(ExitReason::$variant => $name,)* }
            }
        }
    };
}

exit_reasons! {
    ExceptionOrNmi = 0, "EXCEPTION_NMI";
    ExternalInterrupt = 1, "EXTERNAL_INTERRUPT";
    TripleFault = 2, "TRIPLE_FAULT";
    Init = 3, "INIT_SIGNAL";
    Sipi = 4, "SIPI";
    InterruptWindow = 7, "INTERRUPT_WINDOW";
    NmiWindow = 8, "NMI_WINDOW";
    TaskSwitch = 9, "TASK_SWITCH";
    Cpuid = 10, "CPUID";
    Hlt = 12, "HLT";
    Invd = 13, "INVD";
    Invlpg = 14, "INVLPG";
    Rdpmc = 15, "RDPMC";
    Rdtsc = 16, "RDTSC";
    Vmcall = 18, "VMCALL";
    Vmclear = 19, "VMCLEAR";
    Vmlaunch = 20, "VMLAUNCH";
    Vmptrld = 21, "VMPTRLD";
    Vmptrst = 22, "VMPTRST";
    Vmread = 23, "VMREAD";
    Vmresume = 24, "VMRESUME";
    Vmwrite = 25, "VMWRITE";
    Vmxoff = 26, "VMXOFF";
    Vmxon = 27, "VMXON";
    CrAccess = 28, "CR_ACCESS";
    DrAccess = 29, "DR_ACCESS";
    IoInstruction = 30, "IO_INSTRUCTION";
    MsrRead = 31, "MSR_READ";
    MsrWrite = 32, "MSR_WRITE";
    InvalidGuestState = 33, "INVALID_GUEST_STATE";
    MsrLoading = 34, "MSR_LOADING";
    Mwait = 36, "MWAIT";
    MonitorTrapFlag = 37, "MONITOR_TRAP_FLAG";
    Monitor = 39, "MONITOR";
    Pause = 40, "PAUSE";
    MachineCheck = 41, "MACHINE_CHECK";
    TprBelowThreshold = 43, "TPR_BELOW_THRESHOLD";
    ApicAccess = 44, "APIC_ACCESS";
    VirtualizedEoi = 45, "VIRTUALIZED_EOI";
    GdtrIdtrAccess = 46, "GDTR_IDTR_ACCESS";
    LdtrTrAccess = 47, "LDTR_TR_ACCESS";
    EptViolation = 48, "EPT_VIOLATION";
    EptMisconfiguration = 49, "EPT_MISCONFIGURATION";
    Invept = 50, "INVEPT";
    Rdtscp = 51, "RDTSCP";
    PreemptionTimer = 52, "PREEMPTION_TIMER";
    Invvpid = 53, "INVVPID";
    Wbinvd = 54, "WBINVD";
    Xsetbv = 55, "XSETBV";
    ApicWrite = 56, "APIC_WRITE";
    Rdrand = 57, "RDRAND";
    Invpcid = 58, "INVPCID";
    Vmfunc = 59, "VMFUNC";
    Rdseed = 61, "RDSEED";
    PageModificationLogFull = 62, "PML_FULL";
    Xsaves = 63, "XSAVES";
    Xrstors = 64, "XRSTORS";
}
