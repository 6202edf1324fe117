use std::time::{Duration, Instant};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::server::{Cache, FuseServer};
use super::wire::*;
use crate::Device;
use crate::share::serve::Reply;
use crate::share::testing::{Place, Random, SETTINGS, descriptors_below, send};
use crate::share::{Errno, Folder};

fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let len = (IN_HEADER + body.len()) as u32;
    let header = InHeader { len, opcode, unique: 7, nodeid, uid: 1000, gid: 100, pid: 1, extensions: 0 };
    [header.as_bytes(), body].concat()
}

/// A guest's side.
struct Client(FuseServer);

impl Client {
    fn new(place: &Place, cache: Cache) -> Self {
        let client = Self(FuseServer::new(place.share(), cache));
        client.init(Init::all().bits());
        client
    }

    fn init(&self, flags: u64) -> InitOut {
        let asked = InitIn { major: 7, minor: 38, max_readahead: 1 << 20, flags: flags as u32 };
        self.get(opcode::INIT, 0, &[asked.as_bytes(), &[0; 48]].concat())
    }

    /// The answer without its header, or the error.
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let answer = send(&self.0, &request(opcode, node, body)).expect("an answer");
        let (header, rest) = OutHeader::read_from_prefix(&answer).unwrap();
        assert_eq!((header.len as usize, header.unique), (answer.len(), 7));
        if header.error == 0 { Ok(rest.to_vec()) } else { Err(Errno::from_raw_os_error(-header.error)) }
    }

    fn get<T: FromBytes>(&self, opcode: u32, node: u64, body: &[u8]) -> T {
        T::read_from_prefix(&self.ask(opcode, node, body).unwrap()).unwrap().0
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<EntryOut, Errno> {
        let found = self.ask(opcode::LOOKUP, parent, format!("{name}\0").as_bytes())?;
        Ok(EntryOut::read_from_bytes(&found).unwrap())
    }

    fn create(&self, name: &str) -> (EntryOut, OpenOut) {
        let body = with_name(CreateIn { flags: 2, mode: 0o100_644, ..CreateIn::default() }, name);
        let made = self.ask(opcode::CREATE, 1, &body).unwrap();
        let (entry, rest) = EntryOut::read_from_prefix(&made).unwrap();
        (entry, OpenOut::read_from_bytes(rest).unwrap())
    }
}

fn with_name<T: IntoBytes + Immutable>(body: T, name: &str) -> Vec<u8> {
    [body.as_bytes(), name.as_bytes(), &[0]].concat()
}

fn transfer(fh: u64, offset: u64, size: u32) -> TransferIn {
    TransferIn { fh, offset, size, ..TransferIn::default() }
}

#[test]
fn a_connection_begins_with_what_both_can_do() {
    let place = Place::new();
    let client = Client(FuseServer::new(place.share(), Cache::Auto));
    assert_eq!(client.lookup(1, "x").err(), Some(Errno::IO), "nothing before");
    let out = client.init(Init::all().bits());
    let agreed = Init::from_bits_truncate(out.flags.into());
    assert_eq!((out.major, out.minor, out.max_pages), (7, 38, 256));
    let lists = Init::POSIX_ACL | Init::DONT_MASK;
    assert_eq!(agreed, Init::all() - Init::WRITEBACK_CACHE - lists);
    let of_root = Folder::open(&place.path(""), SETTINGS).unwrap();
    let offered = if of_root.has_lists() { lists } else { Init::empty() };
    let client_of_root = Client(FuseServer::new(of_root, Cache::Auto));
    assert_eq!(u64::from(client_of_root.init(lists.bits()).flags), offered.bits());
    let less = Init::POSIX_LOCKS | Init::BIG_WRITES;
    assert_eq!(client.init(less.bits()).flags, less.bits() as u32);
    let always = Client::new(&place, Cache::Always);
    assert!(
        Init::from_bits_truncate(always.init(Init::all().bits()).flags.into())
            .contains(Init::WRITEBACK_CACHE)
    );
    let newer = InitIn { major: 8, ..InitIn::default() };
    assert_eq!(client.get::<InitOut>(opcode::INIT, 0, newer.as_bytes()).major, 7);
    for (major, minor) in [(6, 99), (7, 26)] {
        let old = InitIn { major, minor, ..InitIn::default() };
        assert_eq!(client.ask(opcode::INIT, 0, old.as_bytes()), Err(Errno::PROTO));
    }
}

#[test]
fn a_file_is_made_written_read_and_listed() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    let (entry, open) = client.create("f");
    assert_eq!((entry.attr.uid, entry.attr.mode, entry.attr_valid), (1000, 0o100_644, 1));
    let write = [transfer(open.fh, 3, 5).as_bytes(), b"hello"].concat();
    assert_eq!(client.get::<WriteOut>(opcode::WRITE, entry.nodeid, &write).size, 5);
    let read = client.ask(opcode::READ, entry.nodeid, transfer(open.fh, 0, 100).as_bytes()).unwrap();
    assert_eq!(read, b"\0\0\0hello");
    assert_eq!(client.ask(opcode::READ, entry.nodeid, transfer(open.fh, 99, 100).as_bytes()).unwrap(), b"");
    let attr: AttrOut = client.get(opcode::GETATTR, entry.nodeid, &[0; 16]);
    assert_eq!((attr.attr.size, attr.attr.ino), (8, entry.attr.ino));
    let seek = LseekIn { fh: open.fh, offset: 0, whence: 4, padding: 0 };
    assert_eq!(client.get::<LseekOut>(opcode::LSEEK, entry.nodeid, seek.as_bytes()).offset, 8);
    let release = ReleaseIn { fh: open.fh, ..ReleaseIn::default() };
    client.ask(opcode::RELEASE, entry.nodeid, release.as_bytes()).unwrap();
    assert_eq!(client.ask(opcode::RELEASE, entry.nodeid, release.as_bytes()), Err(Errno::BADF));
    assert_eq!(client.ask(opcode::READ, entry.nodeid, transfer(open.fh, 0, 1).as_bytes()), Err(Errno::BADF));
}

#[test]
fn listings_come_in_parts_with_and_without_the_files() {
    let place = Place::new();
    for number in 0..100 {
        std::fs::write(place.path(&format!("{number:03}")), "").unwrap();
    }
    let client = Client::new(&place, Cache::Auto);
    for (opcode, plus) in [(opcode::READDIR, 0), (opcode::READDIRPLUS, size_of::<EntryOut>())] {
        let open: OpenOut = client.get(opcode::OPENDIR, 1, &[0; 8]);
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let list = client.ask(opcode, 1, transfer(open.fh, offset, 600).as_bytes()).unwrap();
            assert!(list.len() <= 600);
            let mut rest = &list[..];
            while !rest.is_empty() {
                let entry =
                    if plus > 0 { EntryOut::read_from_prefix(rest).unwrap().0 } else { EntryOut::default() };
                let dirent = Dirent::read_from_prefix(&rest[plus..]).unwrap().0;
                let name = &rest[plus + 24..][..dirent.namelen as usize];
                let dots = matches!(name, b"." | b"..");
                assert_eq!(entry.nodeid != 0, plus > 0 && !dots);
                assert!(plus == 0 || dots || (entry.attr.ino == dirent.ino && dirent.kind == 8));
                names.push(String::from_utf8(name.to_vec()).unwrap());
                offset = dirent.off;
                rest = &rest[(plus + 24 + name.len()).next_multiple_of(8)..];
            }
            if list.is_empty() {
                break;
            }
        }
        names.sort();
        assert_eq!((names.len(), &*names[0], &*names[2], &*names[101]), (102, ".", "000", "099"));
        client
            .ask(opcode::RELEASEDIR, 1, ReleaseIn { fh: open.fh, ..ReleaseIn::default() }.as_bytes())
            .unwrap();
    }
}

#[test]
fn names_that_leave_the_folder_are_refused() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    for name in ["..", ".", "../outside", "/etc/passwd", "a/../..", ""] {
        assert!(client.lookup(1, name).is_err(), "{name}");
        let rename = [RenameIn { newdir: 1 }.as_bytes(), b"f\0", name.as_bytes(), &[0]].concat();
        client.create("f");
        assert!(client.ask(opcode::RENAME, 1, &rename).is_err(), "{name}");
        assert!(client.ask(opcode::MKDIR, 1, &with_name(MkdirIn { mode: 0o755, umask: 0 }, name)).is_err());
    }
    assert_eq!(client.ask(opcode::LOOKUP, 1, b"no end"), Err(Errno::INVAL));
    assert_eq!(client.lookup(99, "f").err(), Some(Errno::STALE));
    place.check_outside();
}

#[test]
fn what_the_guest_forgets_is_gone() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    std::fs::write(place.path("f"), "").unwrap();
    let node = client.lookup(1, "f").unwrap().nodeid;
    assert_eq!(client.lookup(1, "f").unwrap().nodeid, node);
    let forget =
        |body: &[u8], opcode| assert_eq!(send(&client.0, &request(opcode, node, body)), Err(Reply::None));
    forget(&1u64.to_le_bytes(), opcode::FORGET);
    client.ask(opcode::GETATTR, node, &[0; 16]).unwrap();
    let one = ForgetOne { nodeid: node, nlookup: 1 };
    forget(
        &[BatchForgetIn { count: u32::MAX, dummy: 0 }.as_bytes(), one.as_bytes()].concat(),
        opcode::BATCH_FORGET,
    );
    assert_eq!(client.ask(opcode::GETATTR, node, &[0; 16]), Err(Errno::STALE));
}

#[test]
fn attributes_of_the_guest_are_asked_for_in_two_steps() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    let (entry, _) = client.create("f");
    let set = [&[3, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8], b"user.a\0xyz"].concat();
    client.ask(opcode::SETXATTR, entry.nodeid, &set).unwrap();
    let size = |size, name| with_name(GetxattrIn { size, padding: 0 }, name);
    let ask = |size_of, name| client.ask(opcode::GETXATTR, entry.nodeid, &size(size_of, name));
    assert_eq!(ask(0, "user.a").unwrap()[0], 3);
    assert_eq!(ask(2, "user.a"), Err(Errno::RANGE));
    assert_eq!(ask(3, "user.a").unwrap(), b"xyz");
    assert_eq!(ask(3, "user.b"), Err(Errno::NODATA));
    let list = GetxattrIn { size: 100, padding: 0 };
    assert_eq!(client.ask(opcode::LISTXATTR, entry.nodeid, list.as_bytes()).unwrap(), b"user.a\0");
    client.ask(opcode::REMOVEXATTR, entry.nodeid, b"user.a\0").unwrap();
    assert_eq!(ask(3, "user.a"), Err(Errno::NODATA));
}

#[test]
fn a_lock_that_somebody_has_is_waited_for_or_refused() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    let (entry, open) = client.create("f");
    let lock =
        |owner, kind: i32| LkIn { fh: open.fh, owner, end: u64::MAX, kind: kind as u32, ..LkIn::default() };
    let ask = |opcode, lock: LkIn| client.ask(opcode, entry.nodeid, lock.as_bytes());
    ask(opcode::SETLK, lock(1, libc::F_WRLCK)).unwrap();
    assert_eq!(ask(opcode::SETLK, lock(2, libc::F_RDLCK)), Err(Errno::AGAIN));
    let found = LkOut::read_from_bytes(&ask(opcode::GETLK, lock(2, libc::F_RDLCK)).unwrap()).unwrap();
    assert_eq!(found.kind as i32, libc::F_WRLCK);
    let wait = request(opcode::SETLKW, entry.nodeid, lock(2, libc::F_RDLCK).as_bytes());
    assert_eq!(send(&client.0, &wait), Err(Reply::Wait(7)));
    let interrupt = request(opcode::INTERRUPT, 0, &7u64.to_le_bytes());
    assert_eq!(send(&client.0, &interrupt), Err(Reply::Cancel(7)));
    // Closing a file gives its owner's locks back.
    client
        .ask(
            opcode::FLUSH,
            entry.nodeid,
            FlushIn { fh: open.fh, lock_owner: 1, ..FlushIn::default() }.as_bytes(),
        )
        .unwrap();
    assert!(send(&client.0, &wait).is_ok());
}

#[test]
fn the_device_tells_its_tag_and_one_queue() {
    let place = Place::new();
    let mut device = super::device(place.share(), "tag", Cache::Auto);
    let mut config = [1; 48];
    device.read_config(0, &mut config);
    assert_eq!((&config[..4], &config[36..44]), (&b"tag\0"[..], &[1, 0, 0, 0, 0, 0, 0, 0][..]));
}

#[test]
fn whatever_a_guest_sends_is_answered_and_stays_in_the_folder() {
    let place = Place::new();
    let outside = place.outside("secret").to_string_lossy().into_owned();
    let names = ["a", "b", "c", "..", ".", "a/b", "", &outside, "link", "pipe", &"n".repeat(256)];
    let mut random = Random(0x5eed_0001);
    let client = Client::new(&place, Cache::Auto);
    let (end, mut count) = (Instant::now() + Duration::from_secs(2), 0u64);
    while Instant::now() < end {
        count += 1;
        let opcode = random.below(54) as u32;
        if matches!(opcode, opcode::SYNCFS | opcode::FSYNC | opcode::FSYNCDIR | opcode::INIT)
            && count % 64 != 0
        {
            continue;
        }
        let mut body = Vec::new();
        for _ in 0..random.below(8) {
            let word = match random.below(4) {
                0 => random.next(),
                // Handles and nodes that there are, and small lengths.
                _ => random.below(24),
            };
            body.extend_from_slice(&word.to_le_bytes());
        }
        if opcode == opcode::FALLOCATE && body.len() >= 24 {
            body[18..24].fill(0);
        }
        for _ in 0..random.below(3) {
            body.extend_from_slice(random.of(&names).as_bytes());
            body.push(0);
        }
        let cut = random.below(8);
        body.truncate(if cut == 0 { random.below(body.len() as u64 + 1) as usize } else { body.len() });
        let request = request(opcode, random.below(20), &body);
        let answer = send(
            &client.0,
            &request
                [..request.len() - if cut == 1 { random.below(40) as usize } else { 0 }.min(request.len())],
        );
        if let Ok(answer) = answer {
            assert!(answer.len() >= OUT_HEADER && answer.len() <= 1 << 21);
        }
    }
    assert!(count > 2000, "{count}");
    assert!(descriptors_below(&place.path("")) <= 300);
    place.check_outside();
    client.init(0);
    assert_eq!(descriptors_below(&place.path("")), 1, "a new connection holds nothing");
}

#[test]
fn the_device_survives_random_drivers() {
    let place = Place::new();
    std::fs::write(place.path("a"), "file").unwrap();
    crate::fuzz::exercise(|| Box::new(super::device(place.share(), "tag", Cache::Auto)));
    place.check_outside();
    assert_eq!(descriptors_below(&place.path("")), 0, "nothing is left open");
}

/// A request's length is right, and nothing reserves more of the host's disk than a little.
fn mend(request: &mut Vec<u8>) {
    request.resize(request.len().max(IN_HEADER), 0);
    let len = (request.len() as u32).to_le_bytes();
    request[..4].copy_from_slice(&len);
    let is_allocation = request[4..8] == opcode::FALLOCATE.to_le_bytes();
    if is_allocation && request.len() >= IN_HEADER + size_of::<FallocateIn>() {
        // The offset's and the length's upper bytes.
        request[IN_HEADER + 11..IN_HEADER + 16].fill(0);
        request[IN_HEADER + 19..IN_HEADER + 24].fill(0);
    }
}

#[test]
fn changed_requests_of_linux_are_answered_and_stay_in_the_folder() {
    crate::share::fuzz::exercise(&crate::share::fuzz::Protocol {
        server: &|folder| Box::new(FuseServer::new(folder, Cache::Auto)),
        corpus: include_str!("corpus.txt"),
        prelude: 1,
        mend,
        check: |request, answer| {
            let header = OutHeader::read_from_prefix(answer).unwrap().0;
            let asked = InHeader::read_from_prefix(request).unwrap().0;
            assert_eq!((header.len as usize, header.unique), (answer.len(), asked.unique));
            assert!((-4095..=0).contains(&header.error) && (header.error == 0 || answer.len() == OUT_HEADER));
        },
    });
}

#[test]
fn a_guest_that_lies_about_numbers_and_lengths_is_refused() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    let (entry, open) = client.create("f");
    let node = entry.nodeid;
    for guess in [0, 2 + node, u64::MAX, i64::MAX as u64] {
        assert_eq!(client.lookup(guess, "f").err(), Some(Errno::STALE), "{guess}");
        assert_eq!(client.ask(opcode::GETATTR, guess, &[0; 16]), Err(Errno::STALE));
        assert_eq!(client.ask(opcode::OPENDIR, guess, &[0; 8]), Err(Errno::STALE));
        let link = with_name(LinkIn { oldnodeid: guess }, "hard");
        assert_eq!(client.ask(opcode::LINK, 1, &link), Err(Errno::STALE));
        let rename = [RenameIn { newdir: guess }.as_bytes(), b"f\0g\0"].concat();
        assert_eq!(client.ask(opcode::RENAME, 1, &rename), Err(Errno::STALE));
        if guess != open.fh {
            let read = client.ask(opcode::READ, node, transfer(guess, 0, 10).as_bytes());
            assert_eq!(read, Err(Errno::BADF), "{guess}");
        }
    }
    // Lengths and offsets of which there are none.
    let written = [transfer(open.fh, 0, 100).as_bytes(), b"short"].concat();
    assert_eq!(client.get::<WriteOut>(opcode::WRITE, node, &written).size, 5, "what there is");
    for offset in [u64::MAX, 1 << 63, i64::MAX as u64] {
        assert!(client.ask(opcode::READ, node, transfer(open.fh, offset, 10).as_bytes()).is_err());
        let write = [transfer(open.fh, offset, 5).as_bytes(), b"short"].concat();
        assert!(client.ask(opcode::WRITE, node, &write).is_err());
        let seek = LseekIn { fh: open.fh, offset, whence: 3, padding: 0 };
        assert!(client.ask(opcode::LSEEK, node, seek.as_bytes()).is_err());
    }
    let read = client.ask(opcode::READ, node, transfer(open.fh, 0, u32::MAX).as_bytes()).unwrap();
    assert_eq!(read, b"short");
    let set = [&u32::MAX.to_le_bytes()[..], &[0; 12], b"user.a\0xyz"].concat();
    assert_eq!(client.ask(opcode::SETXATTR, node, &set), Err(Errno::INVAL));
    let folder: OpenOut = client.get(opcode::OPENDIR, 1, &[0; 8]);
    for offset in [u64::MAX, 12345, 1 << 40] {
        let _ = client.ask(opcode::READDIRPLUS, 1, transfer(folder.fh, offset, 1 << 16).as_bytes());
    }
    client.ask(opcode::READDIR, 1, transfer(folder.fh, 0, 1 << 16).as_bytes()).unwrap();
    assert_eq!(client.ask(opcode::READ, 1, transfer(folder.fh, 0, 10).as_bytes()), Err(Errno::ISDIR));
    assert_eq!(client.ask(opcode::READDIR, 1, transfer(open.fh, 0, 10).as_bytes()), Err(Errno::NOTDIR));
    // More is forgotten than was held; what is open can still be used.
    let forget = request(opcode::FORGET, node, &u64::MAX.to_le_bytes());
    assert_eq!(send(&client.0, &forget), Err(Reply::None));
    assert_eq!(client.ask(opcode::GETATTR, node, &[0; 16]), Err(Errno::STALE));
    let read = client.ask(opcode::READ, node, transfer(open.fh, 0, 10).as_bytes());
    assert_eq!(read.unwrap(), b"short");
    place.check_outside();
}

#[test]
fn handles_and_locks_of_a_guest_have_an_end() {
    let place = Place::new();
    let client = Client::new(&place, Cache::Auto);
    let (entry, open) = client.create("f");
    let ask = |opcode, body: &[u8]| client.ask(opcode, entry.nodeid, body);
    let handles = (0..10_000).take_while(|_| ask(opcode::OPEN, &[0; 8]).is_ok()).count();
    assert!(handles < 300, "{handles}");
    assert_eq!(ask(opcode::OPEN, &[0; 8]), Err(Errno::NFILE));
    let lock = |owner| LkIn { fh: open.fh, owner, kind: libc::F_RDLCK as u32, ..LkIn::default() };
    let locks = (0..10_000).take_while(|&owner| ask(opcode::SETLK, lock(owner).as_bytes()).is_ok()).count();
    assert!(locks < 300, "{locks}");
    assert_eq!(ask(opcode::SETLK, lock(99_999).as_bytes()), Err(Errno::NOLCK));
    assert!(descriptors_below(&place.path("")) <= 300);
}
