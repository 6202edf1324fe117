use std::sync::{Arc, Mutex};

use disk::Close;

use super::request::kind;
use super::*;
use crate::features::{INDIRECT_DESC, RING_PACKED};
use crate::testing::*;
use crate::transport::{Event, Status};

fn block(disk: Box<dyn Disk>, queues: u32) -> Block {
    let (label, serial) = ("disk0.img".into(), "disk0".into());
    Block::new(BlockOptions { disk, label, serial, queues, limits: Limits::default() })
}

/// Four sectors in memory; sector 3 cannot be read or written.
#[derive(Clone)]
struct Fake(Arc<Mutex<Vec<u8>>>, bool);

impl Close for Fake {
    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

impl disk::InPlace for Fake {
    fn is_cached(&self) -> bool {
        false
    }
    fn in_place(
        &self,
        _bytes: (u64, u64),
        _write: bool,
        _action: &mut dyn FnMut(&std::fs::File, u64) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        None
    }
}

impl Disk for Fake {
    fn size(&self) -> u64 {
        4 * SECTOR
    }
    fn is_read_only(&self) -> bool {
        self.1
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if offset + data.len() as u64 > 3 * SECTOR {
            return Err(io::Error::other("bad sector"));
        }
        data.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset + data.len() as u64 > 3 * SECTOR {
            return Err(io::Error::other("bad sector"));
        }
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn direct(&self) -> Option<disk::Direct<'_>> {
        None
    }
    fn geometry(&self) -> disk::Geometry {
        disk::Geometry { logical: 512, physical: 4096, granularity: 4096 }
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.write(offset, &vec![0; len as usize])
    }
    fn extent(&self, _offset: u64) -> io::Result<disk::Extent> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Bench {
    rig: Rig,
    bytes: Arc<Mutex<Vec<u8>>>,
}

const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x100;

impl Bench {
    fn new(negotiated: u64, read_only: bool) -> Self {
        let bytes = Arc::new(Mutex::new((0..4 * SECTOR).map(|at| (at / 7) as u8).collect::<Vec<_>>()));
        let block = block(Box::new(Fake(bytes.clone(), read_only)), 1);
        Self { rig: Rig::new(Box::new(block), 16, negotiated), bytes }
    }

    /// Sends a request with `len` bytes of data for the device to write or read; its status and the used length.
    fn request(&mut self, kind: u32, sector: u64, (len, write): (u32, bool)) -> (u8, u32) {
        let header = u128::from(kind) | u128::from(sector) << 64;
        self.rig.drivers[0].put(BUFFERS, &header.to_le_bytes());
        self.rig.drivers[0].put(STATUS, &[0xaa]);
        let mut buffers = vec![(BUFFERS, 16, false), (DATA, len, write), (STATUS, 1, true)];
        buffers.retain(|buffer| buffer.1 > 0);
        self.rig.send(0, &buffers);
        let (_, used) = self.rig.wait_used(0);
        (self.rig.drivers[0].bytes(STATUS, 1)[0], used)
    }
}

#[test]
fn sectors_are_read_and_written() {
    for format in [INDIRECT_DESC, INDIRECT_DESC | RING_PACKED] {
        let mut bench = Bench::new(format, false);
        assert_eq!(bench.request(kind::IN, 1, (1024, true)), (status::OK, 1025));
        assert_eq!(bench.rig.drivers[0].bytes(DATA, 1024), bench.bytes.lock().unwrap()[512..1536]);
        bench.rig.drivers[0].put(DATA, &[0x5a; 512]);
        assert_eq!(bench.request(kind::OUT, 2, (512, false)), (status::OK, 1));
        assert_eq!(bench.bytes.lock().unwrap()[1024..1536], [0x5a; 512]);
        assert_eq!(bench.request(kind::FLUSH, 0, (0, true)), (status::OK, 1));
        assert_eq!(bench.request(kind::GET_ID, 0, (20, true)), (status::OK, 21));
        assert_eq!(&bench.rig.drivers[0].bytes(DATA, 6), b"disk0\0");
    }
}

#[test]
fn what_is_not_on_the_disk_or_fails_on_the_host_is_an_io_error() {
    let mut bench = Bench::new(INDIRECT_DESC, false);
    for (kind, sector, data) in [
        (kind::IN, 4, (512, true)),
        (kind::IN, 3, (1024, true)),
        (kind::IN, u64::MAX, (512, true)),
        (kind::IN, 0, (511, true)),
        (kind::IN, 3, (512, true)),
        (kind::OUT, 3, (512, false)),
        (kind::OUT, 4, (512, false)),
    ] {
        assert_eq!(bench.request(kind, sector, data).0, status::IO_ERROR, "{kind} {sector}");
    }
    assert_eq!(bench.request(99, 0, (512, true)).0, status::UNSUPPORTED);
}

#[test]
fn a_read_only_disk_says_so_and_is_not_written() {
    let mut bench = Bench::new(INDIRECT_DESC, true);
    let block = block(Box::new(Fake(bench.bytes.clone(), true)), 1);
    assert_eq!(block.features() & feature::READ_ONLY, feature::READ_ONLY);
    let before = bench.bytes.lock().unwrap().clone();
    assert_eq!(bench.request(kind::OUT, 0, (512, false)).0, status::IO_ERROR);
    assert_eq!(*bench.bytes.lock().unwrap(), before);
}

#[test]
fn requests_without_a_header_or_a_status_break_the_rules() {
    for buffers in [&[(BUFFERS, 15, false), (STATUS, 1, true)][..], &[(BUFFERS, 16, false)]] {
        let mut bench = Bench::new(INDIRECT_DESC, false);
        bench.rig.send(0, buffers);
        bench.rig.wait_event(Event::Config);
        assert!(bench.rig.status().contains(Status::NEEDS_RESET));
    }
}

#[test]
fn the_configuration_tells_the_capacity() {
    let mut bench = Bench::new(0, false);
    assert_eq!(bench.rig.config(0, 8), [4, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bench.rig.config(u64::MAX, 8), [0; 8]);
}

/// An image as a disk, 1 MiB, with bytes of a pattern.
struct Image {
    _folder: tempfile::TempDir,
    options: disk::Options,
}

const IMAGE: usize = 1 << 20;

fn pattern() -> Vec<u8> {
    (0..IMAGE as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect()
}

impl Image {
    fn new() -> Self {
        Self::of(disk::Format::Raw)
    }

    fn of(format: disk::Format) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        disk::create(&disk::Creation::new(&path, format, IMAGE as u64)).unwrap();
        let options = disk::Options { format: Some(format), ..disk::Options::new(path) };
        let image = Self { _folder: folder, options };
        image.disk().write(0, &pattern()).unwrap();
        image
    }

    fn disk(&self) -> Box<dyn Disk> {
        disk::open(&self.options).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; IMAGE];
        self.disk().read(0, &mut bytes).unwrap();
        bytes
    }

    fn rig(&self, queues: u32, negotiated: u64) -> Rig {
        Rig::new(Box::new(block(self.disk(), queues)), 256, negotiated)
    }
}

/// Where request `index` of a test has its header, its status and its data.
fn place(index: u64) -> (u64, u64, u64) {
    (BUFFERS + 32 * index, BUFFERS + 0x1_0000 + index, BUFFERS + 0x4_0000 + 8192 * index)
}

/// Puts a request for two pieces of memory into the ring.
fn queue_up(rig: &mut Rig, (queue, index): (u16, u64), kind: u32, sector: u64, len: u32) {
    let (header, status, data) = place(index);
    let driver = &mut rig.drivers[usize::from(queue)];
    driver.put(header, &(u128::from(kind) | u128::from(sector) << 64).to_le_bytes());
    driver.put(status, &[0xaa]);
    let write = kind == kind::IN;
    let half = len / 2;
    driver.send(
        &[(header, 16, false), (data, half, write), (data + 4096, len - half, write), (status, 1, true)],
        true,
    );
}

fn data(rig: &Rig, index: u64, len: usize) -> Vec<u8> {
    let (_, _, data) = place(index);
    [rig.drivers[0].bytes(data, len / 2), rig.drivers[0].bytes(data + 4096, len - len / 2)].concat()
}

#[test]
fn many_requests_at_a_time_go_to_their_places() {
    let plain = INDIRECT_DESC;
    let destination = |index: u64| 1000 + 4 * index + 8 * (index / 3);
    for (negotiated, format, threads) in [
        (plain, disk::Format::Raw, true),
        (plain | RING_PACKED, disk::Format::Raw, true),
        (plain | crate::features::EVENT_IDX, disk::Format::Raw, true),
        (plain, disk::Format::Qcow2, true),
        // Without threads there is no io_uring either.
        (plain, disk::Format::Raw, false),
        (plain, disk::Format::Qcow2, false),
    ] {
        let image = Image::of(format);
        let block = block(image.disk(), 1);
        let block = if threads { block } else { block.without_threads() };
        let mut rig = Rig::new(Box::new(block), 256, negotiated);
        // Neighbours, gaps and steps back, read; then written elsewhere.
        let sectors: Vec<u64> =
            (0..60).map(|index| if index % 7 == 0 { 900 - index } else { 4 * index }).collect();
        for (index, &sector) in (0..).zip(&sectors) {
            queue_up(&mut rig, (0, index), kind::IN, sector, 2048);
        }
        rig.notify(0);
        for _ in &sectors {
            assert_eq!(rig.wait_used(0).1, 2049);
        }
        for (index, &sector) in (0..).zip(&sectors) {
            let expected = &pattern()[sector as usize * 512..][..2048];
            assert!(data(&rig, index, 2048) == expected, "sector {sector}");
            queue_up(&mut rig, (0, index), kind::OUT, destination(index), 2048);
        }
        rig.notify(0);
        for _ in &sectors {
            assert_eq!(rig.wait_used(0).1, 1);
        }
        drop(rig);
        let after = image.bytes();
        for (index, &sector) in (0..).zip(&sectors) {
            let (from, to) = (sector as usize * 512, destination(index) as usize * 512);
            assert!(after[to..to + 2048] == pattern()[from..from + 2048]);
        }
    }
}

#[test]
fn a_driver_with_one_request_at_a_time_has_its_answer_when_it_has_rung() {
    for format in [disk::Format::Raw, disk::Format::Qcow2] {
        let image = Image::of(format);
        let mut rig = image.rig(1, INDIRECT_DESC | super::feature::FLUSH);
        let until = std::time::Instant::now() + Duration::from_secs(60);
        // More in a row than a worker could do by chance before it is looked.
        let (mut in_a_row, mut sector) = (0, 0);
        while in_a_row < 32 {
            assert!(std::time::Instant::now() < until, "{format:?}: it is always the worker who answers");
            sector = (sector + 8) % 1024;
            queue_up(&mut rig, (0, 0), kind::OUT, sector, 4096);
            rig.notify(0);
            in_a_row = if rig.drivers[0].used().is_some() { in_a_row + 1 } else { 0 };
            if in_a_row == 0 {
                rig.wait_used(0);
            }
            assert_eq!(status_of(&rig, 0), status::OK);
        }
    }
}

#[test]
fn every_queue_has_its_worker() {
    let image = Image::new();
    let mut rig = image.rig(4, INDIRECT_DESC | feature::MULTI_QUEUE);
    assert_eq!(rig.config(34, 2), [4, 0]);
    for round in 0..20 {
        for queue in 0..4 {
            queue_up(&mut rig, (queue, queue.into()), kind::IN, 8 * u64::from(queue) + round, 512);
            rig.notify(queue);
        }
        for queue in 0..4u16 {
            rig.wait_used(queue);
            let from = (8 * usize::from(queue) + round as usize) * 512;
            assert!(data(&rig, queue.into(), 512) == pattern()[from..from + 512]);
        }
    }
}

/// A disk whose errors a test decides, on top of memory.
struct Faulty {
    bytes: Mutex<Vec<u8>>,
    /// The error that writes and flushes have now; 0 for none.
    error: Arc<std::sync::atomic::AtomicI32>,
    flushes: Arc<AtomicU64>,
}

impl Close for Faulty {
    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

impl disk::InPlace for Faulty {
    fn is_cached(&self) -> bool {
        false
    }
    fn in_place(
        &self,
        _bytes: (u64, u64),
        _write: bool,
        _action: &mut dyn FnMut(&std::fs::File, u64) -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        None
    }
}

impl Disk for Faulty {
    fn size(&self) -> u64 {
        IMAGE as u64
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn direct(&self) -> Option<disk::Direct<'_>> {
        None
    }
    fn geometry(&self) -> disk::Geometry {
        disk::Geometry { logical: 4096, physical: 4096, granularity: 65536 }
    }
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.fault()?;
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.fault()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(offset, &vec![0xdd; len as usize])
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.write(offset, &vec![u8::from(unmap); len as usize])
    }
    fn extent(&self, _offset: u64) -> io::Result<disk::Extent> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Faulty {
    fn fault(&self) -> io::Result<()> {
        match self.error.load(Ordering::SeqCst) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

type FaultyRig = (Rig, Arc<std::sync::atomic::AtomicI32>, Arc<AtomicU64>);

fn faulty(negotiated: u64) -> FaultyRig {
    let (error, flushes) = (Arc::default(), Arc::default());
    let disk = Faulty {
        bytes: Mutex::new(vec![3; IMAGE]),
        error: Arc::clone(&error),
        flushes: Arc::clone(&flushes),
    };
    (Rig::new(Box::new(block(Box::new(disk), 1)), 64, INDIRECT_DESC | negotiated), error, flushes)
}

fn status_of(rig: &Rig, index: u64) -> u8 {
    rig.drivers[0].bytes(place(index).1, 1)[0]
}

#[test]
fn a_host_without_space_makes_the_guest_wait_and_loses_nothing() {
    for full in [libc::ENOSPC, libc::EDQUOT] {
        let (mut rig, error, _) = faulty(0);
        rig.drivers[0].put(place(0).2, &[9; 256]);
        rig.drivers[0].put(place(0).2 + 4096, &[9; 256]);
        error.store(full, Ordering::SeqCst);
        queue_up(&mut rig, (0, 0), kind::OUT, 5, 512);
        rig.notify(0);
        std::thread::sleep(Duration::from_millis(700));
        assert!(rig.drivers[0].used().is_none() && status_of(&rig, 0) == 0xaa, "no answer yet");
        error.store(0, Ordering::SeqCst);
        rig.wait_used(0);
        assert_eq!(status_of(&rig, 0), status::OK);
        queue_up(&mut rig, (0, 1), kind::IN, 5, 512);
        rig.notify(0);
        rig.wait_used(0);
        assert_eq!(data(&rig, 1, 512), [9; 512]);
        // A reset does not wait for space.
        error.store(full, Ordering::SeqCst);
        queue_up(&mut rig, (0, 0), kind::OUT, 5, 512);
        rig.notify(0);
        std::thread::sleep(Duration::from_millis(20));
        rig.reset();
    }
}

#[test]
fn other_errors_of_the_host_are_the_guests_io_errors() {
    let (mut rig, error, _) = faulty(0);
    error.store(libc::EIO, Ordering::SeqCst);
    for (index, kind) in [(0, kind::OUT), (1, kind::FLUSH)] {
        queue_up(&mut rig, (0, index), kind, 5, 512);
        rig.notify(0);
        rig.wait_used(0);
        assert_eq!(status_of(&rig, index), status::IO_ERROR);
    }
}

#[test]
fn writes_are_durable_at_once_where_the_driver_cannot_flush_or_does_not_want_to() {
    let flushes_of_a_write = |negotiated: u64, writeback: Option<u8>| {
        let (mut rig, _, flushes) = faulty(negotiated);
        if let Some(writeback) = writeback {
            rig.write_config(32, &[writeback]);
            assert_eq!(rig.config(32, 1), [writeback]);
        }
        queue_up(&mut rig, (0, 0), kind::OUT, 5, 512);
        rig.notify(0);
        rig.wait_used(0);
        flushes.load(Ordering::SeqCst)
    };
    assert_eq!(flushes_of_a_write(0, None), 1);
    assert_eq!(flushes_of_a_write(feature::FLUSH, None), 0);
    assert_eq!(flushes_of_a_write(feature::FLUSH | feature::CONFIG_WCE, None), 0);
    assert_eq!(flushes_of_a_write(feature::FLUSH | feature::CONFIG_WCE, Some(0)), 1);
    assert_eq!(flushes_of_a_write(feature::FLUSH | feature::CONFIG_WCE, Some(1)), 0);
}

/// Sends ranges; the status.
fn send_ranges(rig: &mut Rig, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
    let (header, status, data) = place(0);
    let bytes: Vec<u8> = ranges
        .iter()
        .flat_map(|&(sector, sectors, flags)| {
            (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
        })
        .collect();
    let driver = &mut rig.drivers[0];
    driver.put(header, &u128::from(kind).to_le_bytes());
    driver.put(data, &bytes);
    let mut buffers = vec![(header, 16, false), (data, bytes.len() as u32, false), (status, 1, true)];
    buffers.retain(|buffer| buffer.1 > 0);
    rig.send(0, &buffers);
    rig.wait_used(0);
    status_of(rig, 0)
}

#[test]
fn ranges_are_discarded_and_zeroed_and_others_refused() {
    let (mut rig, _, _) = faulty(feature::DISCARD | feature::WRITE_ZEROES);
    let sectors = IMAGE as u64 / 512;
    assert_eq!(send_ranges(&mut rig, kind::DISCARD, &[(1, 1, 0), (3, 2, 0)]), status::OK);
    assert_eq!(send_ranges(&mut rig, kind::WRITE_ZEROES, &[(8, 1, 0), (10, 1, 1)]), status::OK);
    for (sector, byte) in [(0, 3), (1, 0xdd), (2, 3), (3, 0xdd), (4, 0xdd), (5, 3), (8, 0), (9, 3), (10, 1)] {
        queue_up(&mut rig, (0, 1), kind::IN, sector, 512);
        rig.notify(0);
        rig.wait_used(0);
        assert_eq!(data(&rig, 1, 512), [byte; 512], "sector {sector}");
    }
    for (kind, ranges, expected) in [
        (kind::DISCARD, &[(0, 1, 1)][..], status::UNSUPPORTED),
        (kind::WRITE_ZEROES, &[(0, 1, 2)], status::UNSUPPORTED),
        (kind::DISCARD, &[], status::IO_ERROR),
        (kind::DISCARD, &[(sectors, 1, 0)], status::IO_ERROR),
        (kind::DISCARD, &[(u64::MAX, u32::MAX, 0)], status::IO_ERROR),
        (kind::WRITE_ZEROES, &[(0, u32::MAX, 0)], status::IO_ERROR),
        (kind::WRITE_ZEROES, &[(0, 1, 0); 65], status::IO_ERROR),
    ] {
        assert_eq!(send_ranges(&mut rig, kind, ranges), expected, "{kind} {ranges:?}");
    }
    assert_eq!(rig.config(44, 4), [128, 0, 0, 0], "discards of 64 KiB are best");
}

#[test]
fn a_limit_slows_the_disk_down() {
    let image = Image::new();
    let limits = Limits { iops: Some(100), bps: None };
    let (label, serial) = (String::new(), String::new());
    let device = Block::new(BlockOptions { disk: image.disk(), label, serial, queues: 1, limits });
    let mut rig = Rig::new(Box::new(device), 64, INDIRECT_DESC);
    let start = Instant::now();
    for index in 0..40 {
        queue_up(&mut rig, (0, index), kind::IN, index, 512);
    }
    rig.notify(0);
    (0..40).for_each(|_| assert_eq!(rig.wait_used(0).1, 513));
    assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
}

/// Random chains: whatever the driver says, the device answers, or asks for a reset.
#[test]
fn random_requests_are_answered_or_break_the_device_cleanly() {
    let image = Image::new();
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut below = move |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 8) % end
    };
    let mut rig = image.rig(1, INDIRECT_DESC | feature::DISCARD | feature::WRITE_ZEROES);
    for _ in 0..500 {
        let header = place(0).0;
        let kinds = [0, 1, 4, 8, 10, 11, 13, 14, u32::MAX];
        let kind = kinds[below(kinds.len() as u64) as usize];
        let sector = [below(2048), below(4096), u64::MAX - below(9), below(8) << 60][below(4) as usize];
        rig.drivers[0].put(header, &(u128::from(kind) | u128::from(sector) << 64).to_le_bytes());
        let mut buffers = vec![(header, 16, false)];
        let mut write = false;
        for index in 0..below(6) {
            write |= below(2) == 0;
            let len = [1, 16, 512, 1024, 4096, 511, 70_000][below(7) as usize];
            let address = match below(50) {
                0 => RAM - 100,
                1 => ROM,
                _ => BUFFERS + 0x1_0000 + index * 0x1_0000,
            };
            buffers.push((address, len, write));
        }
        if below(40) == 0 {
            buffers[0].1 = 15;
        }
        if below(10) > 0 {
            buffers.push((place(0).1, 1, true));
        }
        rig.send(0, &buffers);
        let until = Instant::now() + Duration::from_secs(10);
        while rig.drivers[0].used().is_none() {
            if rig.status().contains(Status::NEEDS_RESET) {
                rig.restart();
                break;
            }
            assert!(Instant::now() < until, "no answer for {kind} at {sector}: {buffers:x?}");
            std::hint::spin_loop();
        }
    }
}
