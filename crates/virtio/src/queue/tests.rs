use super::*;
use crate::features::{EVENT_IDX, INDIRECT_DESC, RING_PACKED};
use crate::testing::*;

const FORMATS: [u64; 2] = [0, RING_PACKED];

fn data(driver: &Driver, address: u64, bytes: &[u8]) {
    driver.memory.write(address, bytes).unwrap();
}

#[test]
fn requests_come_with_their_buffers_and_go_back_with_what_was_written() {
    for format in FORMATS {
        for indirect in [false, true] {
            let mut driver = Driver::new(8, format | INDIRECT_DESC);
            let mut queue = driver.queue();
            assert_eq!(queue.pop(), Ok(None));
            // Three times round the ring.
            for round in 0..12u8 {
                let buffers = [(BUFFERS, 3, false), (BUFFERS + 100, 2, false), (BUFFERS + 200, 4, true)];
                data(&driver, BUFFERS, &[round, 2, 3]);
                data(&driver, BUFFERS + 100, &[4, 5]);
                driver.send(&buffers, indirect);
                let chain = queue.pop().unwrap().unwrap();
                let mut read = [0; 5];
                assert_eq!(chain.read(queue.memory(), 0, &mut read), Ok(5));
                assert_eq!(read, [round, 2, 3, 4, 5]);
                assert_eq!(chain.read(queue.memory(), 4, &mut read), Ok(1));
                assert_eq!((read[0], chain.readable_len(), chain.writable_len()), (5, 5, 4));
                assert_eq!(chain.write(queue.memory(), 1, &[7; 9]), Ok(3));
                assert_eq!(driver.used(), None);
                queue.complete(&chain, 4).unwrap();
                assert_eq!(driver.used().map(|(_, len)| len), Some(4), "{format:#x} {indirect} {round}");
                assert_eq!(driver.bytes(BUFFERS + 201, 4), [7, 7, 7, 0]);
                assert_eq!(queue.pop(), Ok(None));
            }
        }
    }
}

#[test]
fn several_requests_wait_and_are_used_in_any_number() {
    for format in FORMATS {
        let mut driver = Driver::new(4, format);
        let mut queue = driver.queue();
        for _ in 0..5 {
            for index in 0..4 {
                driver.send(&[(BUFFERS + index, 1, true)], false);
            }
            let chains: Vec<_> = (0..4).map(|_| queue.pop().unwrap().unwrap()).collect();
            assert_eq!(queue.pop(), Ok(None));
            for chain in &chains {
                queue.complete(chain, 1).unwrap();
            }
            assert_eq!((0..5).filter_map(|_| driver.used()).count(), 4);
        }
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    for format in FORMATS {
        let mut driver = Driver::new(4, format);
        let mut queue = driver.queue();
        for wanted in [true, false, true] {
            driver.want_interrupts(wanted);
            driver.send(&[(BUFFERS, 1, true)], false);
            let chain = queue.pop().unwrap().unwrap();
            assert_eq!(queue.needs_notification(), Ok(false), "nothing is used yet");
            queue.complete(&chain, 0).unwrap();
            assert_eq!(queue.needs_notification(), Ok(wanted));
            assert_eq!(queue.needs_notification(), Ok(false), "told once");
        }
    }
}

#[test]
fn with_event_indices_the_interrupt_comes_at_the_entry_that_was_named() {
    for format in FORMATS {
        let mut driver = Driver::new(8, format | EVENT_IDX);
        let mut queue = driver.queue();
        for _ in 0..7 {
            driver.want_interrupt_after(2);
            let mut told = Vec::new();
            for _ in 0..4 {
                driver.send(&[(BUFFERS, 1, true)], false);
                let chain = queue.pop().unwrap().unwrap();
                queue.complete(&chain, 0).unwrap();
                told.push(queue.needs_notification().unwrap());
            }
            assert_eq!(told, [false, false, true, false], "{format:#x}");
            while driver.used().is_some() {}
            assert_eq!(queue.pop(), Ok(None));
        }
    }
}

#[test]
fn with_event_indices_the_device_names_the_entry_that_it_waits_for() {
    let mut driver = Driver::new(4, EVENT_IDX);
    let mut queue = driver.queue();
    driver.send(&[(BUFFERS, 1, true)], false);
    assert!(queue.pop().unwrap().is_some());
    assert_eq!(queue.pop(), Ok(None));
    assert_eq!(driver.get16(driver.config.device + 4 + 8 * 4), 1);
    let mut driver = Driver::new(4, EVENT_IDX | RING_PACKED);
    let mut queue = driver.queue();
    driver.send(&[(BUFFERS, 1, true)], false);
    assert!(queue.pop().unwrap().is_some());
    assert_eq!(queue.pop(), Ok(None));
    assert_eq!(
        (driver.get16(driver.config.device), driver.get16(driver.config.device + 2)),
        (1 | 1 << 15, 2)
    );
}

#[test]
fn buffers_that_are_not_there_or_cannot_be_are_refused() {
    for format in FORMATS {
        let refused = |list: &[((u64, u32), u16)]| refusal(&mut Driver::new(8, format | INDIRECT_DESC), list);
        let memory = |address, len| Some(QueueError::Memory { address, len });
        assert_eq!(refused(&[((RAM - 4, 8), 0)]), memory(RAM - 4, 8));
        assert_eq!(refused(&[((u64::MAX - 2, 8), WRITE)]), memory(u64::MAX - 2, 8));
        assert_eq!(refused(&[((ROM, 8), WRITE)]), memory(ROM, 8));
        assert_eq!(refused(&[((ROM, 8), 0)]), None);
        assert_eq!(refused(&[((BUFFERS, 0), 0)]), Some(QueueError::EmptyBuffer));
        assert_eq!(refused(&[((BUFFERS, 1), WRITE), ((BUFFERS, 1), 0)]), Some(QueueError::Order));
        let indirect = |len, flags| Some(QueueError::Indirect { len, flags });
        let bare = |error: Option<QueueError>| match error {
            Some(QueueError::Indirect { len, .. }) => indirect(len, 0),
            other => other,
        };
        for len in [0, 8, 24, 16 * 1025] {
            assert_eq!(bare(refused(&[((BUFFERS, len), INDIRECT_FLAG)])), indirect(len, 0), "{len}");
        }
        assert_eq!(bare(refused(&[((BUFFERS, 16), INDIRECT_FLAG), ((BUFFERS, 1), 0)])), indirect(16, 0));
        assert_eq!(refused(&[((RAM, 16), INDIRECT_FLAG)]), memory(RAM, 16));
        let mut without = Driver::new(8, format);
        assert_eq!(bare(refusal(&mut without, &[((BUFFERS, 16), INDIRECT_FLAG)])), indirect(16, 0));
    }
}

#[test]
fn tables_in_tables_and_buffers_of_more_than_a_length_can_tell_are_refused() {
    for format in FORMATS {
        let mut driver = Driver::new(8, format | INDIRECT_DESC);
        driver.descriptor(BUFFERS, 0, (BUFFERS, 16), 0, INDIRECT_FLAG);
        let refused = refusal(&mut driver, &[((BUFFERS, 16), INDIRECT_FLAG)]);
        assert_eq!(refused, Some(QueueError::Indirect { len: 16, flags: INDIRECT_FLAG }));
        let mut driver = Driver::new(8, format);
        let refused = refusal(&mut driver, &[((BUFFERS, 8), 0), ((0, u32::MAX), WRITE)]);
        assert_eq!(refused, Some(QueueError::TooLong));
    }
}

#[test]
fn chains_that_go_round_or_leave_their_table_are_refused() {
    let mut driver = Driver::new(4, INDIRECT_DESC);
    let mut queue = driver.queue();
    driver.publish(0, &[((BUFFERS, 1), 0)]);
    driver.descriptor(driver.config.descriptors, 0, (BUFFERS, 1), 0, NEXT);
    assert_eq!(queue.pop(), Err(QueueError::Endless(4)));
    driver.descriptor(driver.config.descriptors, 0, (BUFFERS, 1), 4, NEXT);
    assert_eq!(queue.pop(), Err(QueueError::NoDescriptor { index: 4, size: 4 }));
    driver.descriptor(driver.config.descriptors, 0, (BUFFERS + 64, 32), 0, INDIRECT_FLAG);
    driver.descriptor(BUFFERS + 64, 0, (BUFFERS, 1), 2, NEXT);
    assert_eq!(queue.pop(), Err(QueueError::NoDescriptor { index: 2, size: 2 }));
    driver.descriptor(BUFFERS + 64, 0, (BUFFERS, 1), 0, NEXT);
    assert_eq!(queue.pop(), Err(QueueError::Endless(2)));
    driver.put16(driver.config.driver + 4, 9);
    assert_eq!(queue.pop(), Err(QueueError::NoDescriptor { index: 9, size: 4 }));
    let mut packed = Driver::new(4, RING_PACKED);
    let mut queue = packed.queue();
    packed.publish(0, &[((BUFFERS, 1), NEXT); 4]);
    assert_eq!(queue.pop(), Err(QueueError::Endless(4)));
}

#[test]
fn an_index_that_jumps_over_the_ring_is_refused() {
    let driver = Driver::new(4, 0);
    let mut queue = driver.queue();
    driver.put16(driver.config.driver + 2, 5);
    assert_eq!(queue.pop(), Err(QueueError::IndexJump { from: 0, to: 5, size: 4 }));
}

#[test]
fn areas_that_are_odd_or_not_there_make_no_queue() {
    let driver = Driver::new(8, 0);
    let with = |change: &dyn Fn(&mut QueueConfig), format| {
        let mut config = driver.config;
        change(&mut config);
        Queue::new(&config, format, &driver.memory).err()
    };
    let alignment = |address, alignment| Some(QueueError::Alignment { address, alignment });
    assert_eq!(with(&|config| config.size = 6, 0), Some(QueueError::Size(6)));
    assert_eq!(with(&|config| config.size = 6, RING_PACKED), None);
    for format in FORMATS {
        assert_eq!(with(&|config| config.size = 0, format), Some(QueueError::Size(0)));
        assert_eq!(with(&|config| config.size = 0x8001, format), Some(QueueError::Size(0x8001)));
        assert_eq!(with(&|config| config.descriptors = 0x1008, format), alignment(0x1008, 16));
        assert_eq!(with(&|config| config.device = 0x6002, format), alignment(0x6002, 4));
        assert!(matches!(with(&|config| config.device = ROM, format), Some(QueueError::Memory { .. })));
        assert!(matches!(
            with(&|config| config.descriptors = RAM - 16, format),
            Some(QueueError::Memory { .. })
        ));
        assert!(matches!(
            with(&|config| config.driver = u64::MAX - 3, format),
            Some(QueueError::Memory { .. })
        ));
    }
}
