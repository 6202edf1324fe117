//! Random accesses to a device's registers, for the tests of all devices: nothing that a guest does may panic.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::bus::SharedDevice;
use crate::clock::{ManualTime, Timers};

/// What a guest or time does.
#[derive(Clone, Debug)]
enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Name(u64, bool),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    // Mostly the registers, at times the far end of the address space.
    let offset = || prop_oneof![12 => 0u64..0x44, 1 => 0u64..0x2000, 1 => any::<u64>()];
    let size = || prop::sample::select(vec![1usize, 1, 1, 2, 4, 8]);
    let byte = || prop_oneof![4 => any::<u8>(), 1 => Just(0u8), 1 => Just(0xff), 1 => Just(0x80)];
    let data = size().prop_flat_map(move |size| prop::collection::vec(byte(), size));
    let pass = prop_oneof![0u64..2_000, 0u64..2_000_000, 0u64..2_000_000_000, 0u64..(1 << 60)];
    prop_oneof![
        3 => (offset(), size()).prop_map(|(offset, size)| Step::Read(offset, size)),
        6 => (offset(), data).prop_map(|(offset, data)| Step::Write(offset, data)),
        1 => (offset(), any::<bool>()).prop_map(|(offset, write)| Step::Name(offset, write)),
        2 => pass.prop_map(Step::Pass),
    ]
}

/// Makes the device anew and does random things to it, many times, from a fixed seed.
pub(crate) fn exercise<D, F>(make: F)
where
    D: crate::bus::Device + 'static,
    F: Fn(&Timers) -> std::sync::Arc<std::sync::Mutex<D>>,
{
    let config = Config { cases: 256, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let steps = prop::collection::vec(step(), 1..200);
    let result = runner.run(&steps, |steps| {
        let time = ManualTime::new();
        time.set_wall_start(1_700_000_000_000_000_000);
        let timers = Timers::new(time.clone());
        let device: SharedDevice = make(&timers);
        for step in steps {
            run_step(&device, &time, &timers, step);
        }
        Ok(())
    });
    result.unwrap();
}

fn run_step(device: &SharedDevice, time: &ManualTime, timers: &Timers, step: Step) {
    match step {
        Step::Read(offset, size) => device.lock().unwrap().read(offset, &mut vec![0; size]),
        Step::Write(offset, data) => device.lock().unwrap().write(offset, &data),
        Step::Name(offset, write) => assert!(!device.lock().unwrap().register(offset, write).is_empty()),
        Step::Pass(ns) => {
            time.advance(ns);
            timers.run_due();
        }
    }
}
