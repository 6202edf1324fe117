use crate::{Bus, CpuEvent, InterruptController, MsrFault, Space};

/// No devices and no interrupts: the outside of a vCPU that has none, as in tests and measurements.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

impl Bus for Nothing {
    fn read(&self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _: Space, _: u64, _: &[u8]) {}
}

impl InterruptController for Nothing {
    fn has_interrupt(&self) -> bool {
        false
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn take_event(&self, _: bool) -> Option<CpuEvent> {
        None
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&self, _: u8) {}
    fn performance_interrupt(&self) {}
    fn read_msr(&self, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn write_msr(&self, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
}
