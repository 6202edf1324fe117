use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, OFlags};

use super::ownership::{Caller, Ownership};
use super::testing::{Place, SETTINGS};
use super::*;

const USER: Caller = Caller { uid: 1000, gid: 100, umask: 0 };
const ROOT_USER: Caller = Caller { uid: 0, gid: 0, umask: 0 };

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().permissions().mode()
}

#[test]
fn only_names_of_one_file_are_names() {
    let place = Place::new();
    let folder = place.share();
    let long = [b'x'; 256];
    for name in [&b".."[..], b".", b"a/b", b"../outside", b"/etc", b"a\0b", b"", &long] {
        let shown = String::from_utf8_lossy(name).into_owned();
        assert!(folder.lookup(ROOT, name).is_err(), "{shown}");
        assert!(folder.create(ROOT, name, OFlags::RDWR, 0o644, USER).is_err(), "{shown}");
        assert!(folder.make_folder(ROOT, name, 0o755, USER).is_err(), "{shown}");
        assert!(folder.make_link(ROOT, name, b"x", USER).is_err(), "{shown}");
        assert!(
            folder.remove(ROOT, name, true).is_err() && folder.remove(ROOT, name, false).is_err(),
            "{shown}"
        );
        assert!(folder.rename((ROOT, name), (ROOT, b"n"), RenameFlags::empty()).is_err(), "{shown}");
    }
    for name in ["\n", "  ", "ä", "-rf", "a\\b", "*", "...", "\u{7f}"] {
        folder.create(ROOT, name.as_bytes(), OFlags::RDWR, 0o644, USER).unwrap();
        assert!(place.path(name).is_file(), "{name:?}");
    }
    folder.create(ROOT, b"\xff\xfe", OFlags::RDWR, 0o644, USER).unwrap();
    place.check_outside();
}

#[test]
fn symbolic_links_are_text() {
    let place = Place::new();
    let folder = place.share();
    let target = place.outside("");
    let link = folder.make_link(ROOT, b"link", target.as_os_str().as_encoded_bytes(), ROOT_USER).unwrap();
    folder.make_link(ROOT, b"file", b"../outside/new", ROOT_USER).unwrap();
    assert_eq!(folder.read_link(link.node).unwrap(), target.as_os_str().as_encoded_bytes());
    assert_eq!(folder.lookup(link.node, b"secret"), Err(Errno::NOTDIR));
    assert_eq!(folder.open_file(link.node, OFlags::RDONLY), Err(Errno::LOOP));
    assert_eq!(folder.open_folder(link.node), Err(Errno::NOTDIR));
    let created = folder.create(ROOT, b"file", OFlags::RDWR | OFlags::TRUNC, 0o644, USER);
    assert_eq!(created.unwrap_err(), Errno::LOOP);
    assert!(folder.make_folder(link.node, b"x", 0o755, USER).is_err());
    let hard = folder.link(link.node, ROOT, b"hard").unwrap();
    assert_eq!(hard.attributes.links, 2);
    assert_eq!(std::fs::read_link(place.path("hard")).unwrap(), target);
    place.check_outside();
}

#[test]
fn special_files_are_shown_and_never_opened() {
    let place = Place::new();
    let folder = place.share();
    let pipe = FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, place.path("pipe"), pipe, 0o666.into(), 0).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap();
    for (name, shown) in [("pipe", kind::FIFO), ("socket", kind::SOCKET)] {
        let entry = folder.lookup(ROOT, name.as_bytes()).unwrap();
        assert_eq!(entry.attributes.owner.mode & kind::MASK, shown);
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR | OFlags::TRUNC] {
            assert_eq!(folder.open_file(entry.node, flags), Err(Errno::ACCESS));
            assert_eq!(folder.create(ROOT, name.as_bytes(), flags, 0o644, USER).unwrap_err(), Errno::ACCESS);
        }
        assert!(folder.change(entry.node, None, &Changes { size: Some(0), ..Changes::default() }).is_err());
    }
    drop(socket);
}

#[test]
fn what_the_kernel_mounts_is_not_entered() {
    let settings = Settings { read_only: true, ..SETTINGS };
    let folder = Folder::open(Path::new("/"), settings).unwrap();
    let entry = folder.lookup(ROOT, b"proc").unwrap();
    assert_eq!(entry.attributes.owner.mode & kind::MASK, kind::FOLDER);
    assert_eq!(folder.lookup(entry.node, b"self"), Err(Errno::ACCESS));
    assert_eq!(folder.open_folder(entry.node), Err(Errno::ACCESS));
}

#[test]
fn descriptors_are_a_cache_and_files_stay_reachable() {
    let place = Place::new();
    let folder = place.share_with(Settings { descriptors: 48, ..SETTINGS });
    let below = folder.make_folder(ROOT, b"below", 0o755, ROOT_USER).unwrap().node;
    let nodes: Vec<_> = (0..500)
        .map(|number| {
            folder
                .make_node(below, format!("f{number}").as_bytes(), kind::FILE | 0o644, 0, ROOT_USER)
                .unwrap()
        })
        .collect();
    for _ in 0..2 {
        for entry in &nodes {
            assert_eq!(folder.attributes(entry.node).unwrap().inode, entry.attributes.inode);
        }
        assert!(folder.nodes().descriptors() <= 25, "{}", folder.nodes().descriptors());
    }
    // Also when the folder above has moved meanwhile.
    folder.make_folder(ROOT, b"other", 0o755, ROOT_USER).unwrap();
    let to = folder.lookup(ROOT, b"other").unwrap().node;
    folder.rename((ROOT, b"below"), (to, b"moved"), RenameFlags::empty()).unwrap();
    for entry in &nodes {
        assert_eq!(folder.attributes(entry.node).unwrap().inode, entry.attributes.inode);
    }
}

#[test]
fn what_nobody_holds_is_gone() {
    let place = Place::new();
    let folder = place.share();
    let parent = folder.make_folder(ROOT, b"a", 0o755, ROOT_USER).unwrap().node;
    let child = folder.make_folder(parent, b"b", 0o755, ROOT_USER).unwrap().node;
    assert_eq!(folder.lookup(parent, b"b").unwrap().node, child);
    folder.forget(parent, 1);
    assert_eq!(folder.nodes().len(), 3, "a folder stays for what is in it");
    folder.forget(child, 1);
    folder.attributes(child).unwrap();
    folder.forget(child, 7);
    assert_eq!(folder.nodes().len(), 1);
    assert_eq!(folder.attributes(child), Err(Errno::STALE));
    folder.forget(ROOT, 99);
    folder.attributes(ROOT).unwrap();
}

#[test]
fn what_changed_behind_the_guests_back_is_stale_and_never_another_file() {
    let place = Place::new();
    let folder = place.share();
    std::fs::write(place.path("a"), "a").unwrap();
    let entry = folder.lookup(ROOT, b"a").unwrap();
    std::fs::write(place.path("b"), "other").unwrap();
    std::fs::rename(place.path("b"), place.path("a")).unwrap();
    assert_eq!(folder.attributes(entry.node), Err(Errno::STALE));
    assert_eq!(folder.open_file(entry.node, OFlags::RDWR), Err(Errno::STALE));
    assert_ne!(folder.lookup(ROOT, b"a").unwrap().node, entry.node);
}

#[test]
fn a_file_without_a_name_lives_while_it_is_open() {
    let place = Place::new();
    let folder = place.share();
    let (entry, handle) = folder.create(ROOT, b"f", OFlags::RDWR, 0o644, USER).unwrap();
    folder.remove(ROOT, b"f", false).unwrap();
    assert_eq!(folder.attributes(entry.node).unwrap().links, 0);
    let grown = Changes { size: Some(5), ..Changes::default() };
    assert_eq!(folder.change(entry.node, Some(handle), &grown).unwrap().size, 5);
    assert_eq!(folder.link(entry.node, ROOT, b"again").err(), Some(Errno::NOENT));
    // One with another name lives in any case.
    let one = folder.make_node(ROOT, b"one", kind::FILE | 0o644, 0, USER).unwrap();
    folder.link(one.node, ROOT, b"two").unwrap();
    folder.remove(ROOT, b"two", false).unwrap();
    assert_eq!(folder.attributes(one.node).unwrap().links, 1);
    folder.make_node(ROOT, b"three", kind::FILE | 0o644, 0, USER).unwrap();
    let (entry, _handle) = folder.create(ROOT, b"three", OFlags::RDWR, 0o644, USER).unwrap();
    folder.rename((ROOT, b"one"), (ROOT, b"three"), RenameFlags::empty()).unwrap();
    assert_eq!(folder.attributes(entry.node).unwrap().links, 0);
    assert_eq!(folder.lookup(ROOT, b"three").unwrap().node, one.node);
}

#[test]
fn an_exchange_moves_both() {
    let place = Place::new();
    let folder = place.share();
    let below = folder.make_folder(ROOT, b"d", 0o755, ROOT_USER).unwrap().node;
    let one = folder.make_node(ROOT, b"one", kind::FILE | 0o644, 0, USER).unwrap().node;
    let two = folder.make_node(below, b"two", kind::FILE | 0o644, 0, USER).unwrap().node;
    folder.rename((ROOT, b"one"), (below, b"two"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(folder.lookup(below, b"two").unwrap().node, one);
    assert_eq!(folder.lookup(ROOT, b"one").unwrap().node, two);
    let again = folder.rename((ROOT, b"one"), (below, b"two"), RenameFlags::NOREPLACE);
    assert_eq!(again, Err(Errno::EXIST));
    assert_eq!(folder.rename((ROOT, b"one"), (ROOT, b"x"), RenameFlags::WHITEOUT), Err(Errno::INVAL));
}

#[test]
fn the_users_files_are_roots_and_other_owners_are_beside_the_file() {
    let place = Place::new();
    let folder = place.share();
    std::fs::write(place.path("own"), "").unwrap();
    assert_eq!(folder.lookup(ROOT, b"own").unwrap().attributes.owner.uid, 0);
    let entry = folder.make_node(ROOT, b"f", kind::FILE | 0o640, 0, USER).unwrap();
    let host = std::fs::metadata(place.path("f")).unwrap();
    let own = std::fs::metadata(place.path("own")).unwrap();
    assert_eq!((entry.attributes.owner.uid, entry.attributes.owner.gid), (1000, 100));
    assert_eq!((host.uid(), host.gid()), (own.uid(), own.gid()));
    let back = Changes { uid: Some(0), gid: Some(0), ..Changes::default() };
    let owner = folder.change(entry.node, None, &back).unwrap().owner;
    assert_eq!((owner.uid, owner.gid, owner.mode), (0, 0, kind::FILE | 0o640));
    assert!(folder.attribute_names(entry.node, 0).unwrap().is_empty());
    assert_eq!(folder.attribute(entry.node, b"user.ringside.owner"), Err(Errno::PERM));
    assert_eq!(folder.set_attribute(entry.node, b"user.ringside.owner", b"x", 0), Err(Errno::PERM));
    // A symbolic link has no room for another owner.
    let link = folder.make_link(ROOT, b"l", b"x", USER).unwrap();
    assert_eq!(link.attributes.owner.uid, 0);
    let other = Changes { uid: Some(5), ..Changes::default() };
    assert_eq!(folder.change(link.node, None, &other), Err(Errno::PERM));
    folder.change(link.node, None, &back).unwrap();
}

#[test]
fn privileges_and_devices_are_not_on_the_host() {
    let place = Place::new();
    let folder = place.share();
    let program = folder.make_node(ROOT, b"su", kind::FILE | 0o6755, 0, ROOT_USER).unwrap();
    assert_eq!(program.attributes.owner.mode, kind::FILE | 0o6755);
    assert_eq!(mode(&place.path("su")) & 0o7777, 0o755);
    folder.set_attribute(program.node, b"security.capability", b"cap", 0).unwrap();
    assert!(rustix::fs::getxattr(place.path("su"), "security.capability", &mut [0; 64]).is_err());
    assert_eq!(folder.attribute_names(program.node, 7).unwrap(), b"security.capability\0");
    folder.set_attribute(program.node, b"trusted.x", b"1", 0).unwrap();
    assert_eq!(folder.attribute_names(program.node, 7).unwrap(), b"security.capability\0", "roots alone");
    let all = folder.attribute_names(program.node, 0).unwrap();
    assert!(all.split(|&byte| byte == 0).any(|name| name == b"trusted.x"));
    // Who writes to it takes them away.
    folder.kill_privileges(program.node).unwrap();
    assert_eq!(folder.attributes(program.node).unwrap().owner.mode, kind::FILE | 0o755);
    assert_eq!(folder.attribute(program.node, b"security.capability"), Err(Errno::NODATA));
    let disk = folder.make_node(ROOT, b"sda", kind::BLOCK | 0o660, 0x800, ROOT_USER).unwrap();
    assert_eq!((disk.attributes.owner.mode, disk.attributes.owner.rdev), (kind::BLOCK | 0o660, 0x800));
    assert!(place.path("sda").is_file());
    folder.make_node(ROOT, b"pipe", kind::FIFO | 0o600, 0, ROOT_USER).unwrap();
    assert_eq!(mode(&place.path("pipe")) & kind::MASK, kind::FIFO);
    // What the guest makes unreadable for all stays readable for Ringside.
    let changes = Changes { mode: Some(0), ..Changes::default() };
    assert_eq!(folder.change(program.node, None, &changes).unwrap().owner.mode, kind::FILE);
    assert_eq!(mode(&place.path("su")) & 0o777, 0o600);
    // A change of the owner takes them as well.
    let changes = Changes { mode: Some(0o4755), ..Changes::default() };
    folder.change(program.node, None, &changes).unwrap();
    let changes = Changes { uid: Some(7), ..Changes::default() };
    assert_eq!(folder.change(program.node, None, &changes).unwrap().owner.mode, kind::FILE | 0o755);
}

#[test]
fn a_folder_hands_its_group_on() {
    let place = Place::new();
    let folder = place.share();
    let group = folder.make_folder(ROOT, b"g", 0o2775, Caller { uid: 0, gid: 50, umask: 0 }).unwrap();
    assert_eq!(group.attributes.owner.mode & 0o7777, 0o2775);
    let file = folder.make_node(group.node, b"f", kind::FILE | 0o644, 0, USER).unwrap();
    let below = folder.make_folder(group.node, b"d", 0o755, USER).unwrap();
    assert_eq!((file.attributes.owner.gid, below.attributes.owner.gid), (50, 50));
    assert_eq!(below.attributes.owner.mode & 0o7777, 0o2755);
}

#[test]
fn as_root_owners_are_the_hosts() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root");
        return;
    }
    let place = Place::new();
    let settings = SETTINGS;
    let folder = Folder::open(&place.path(""), settings).unwrap();
    folder.make_node(ROOT, b"f", kind::FILE | 0o4755, 0, USER).unwrap();
    folder.make_link(ROOT, b"l", b"x", USER).unwrap();
    for name in ["f", "l"] {
        let host = std::fs::symlink_metadata(place.path(name)).unwrap();
        assert_eq!((host.uid(), host.gid()), (1000, 100), "{name}");
    }
    assert_eq!(mode(&place.path("f")) & 0o7777, 0o755);
    assert_eq!(folder.lookup(ROOT, b"f").unwrap().attributes.owner.mode & 0o7777, 0o4755);
}

#[test]
fn a_read_only_folder_stays_as_it_is() {
    let place = Place::new();
    std::fs::write(place.path("f"), "text").unwrap();
    std::fs::create_dir(place.path("d")).unwrap();
    let folder = place.share_with(Settings { read_only: true, ..SETTINGS });
    let file = folder.lookup(ROOT, b"f").unwrap().node;
    let handle = folder.open_file(file, OFlags::RDONLY).unwrap();
    let refused: [Result<()>; 15] = [
        folder.open_file(file, OFlags::WRONLY).map(drop),
        folder.open_file(file, OFlags::RDWR).map(drop),
        folder.open_file(file, OFlags::RDONLY | OFlags::TRUNC).map(drop),
        folder.create(ROOT, b"n", OFlags::RDWR, 0o644, USER).map(drop),
        folder.make_node(ROOT, b"n", kind::FILE, 0, USER).map(drop),
        folder.make_folder(ROOT, b"n", 0o755, USER).map(drop),
        folder.make_link(ROOT, b"n", b"f", USER).map(drop),
        folder.link(file, ROOT, b"n").map(drop),
        folder.rename((ROOT, b"f"), (ROOT, b"n"), RenameFlags::empty()),
        folder.remove(ROOT, b"f", false),
        folder.remove(ROOT, b"d", true),
        folder.change(file, None, &Changes { mode: Some(0), ..Changes::default() }).map(drop),
        folder.set_attribute(file, b"user.x", b"", 0),
        folder.allocate(handle, 0, 0, 10),
        folder.copy((handle, 0), (handle, 2), 1).map(drop),
    ];
    assert!(refused.iter().all(|result| *result == Err(Errno::ROFS)), "{refused:?}");
    assert_eq!(std::fs::read(place.path("f")).unwrap(), b"text");
    // Locks write nothing.
    let owner = LockOwner { node: file, owner: 1, whole: true };
    folder.lock(owner, LockKind::Exclusive, LockRange { start: 0, end: u64::MAX }).unwrap();
}

#[test]
fn locks_keep_out_other_owners_and_programs_of_the_host() {
    let place = Place::new();
    let folder = place.share();
    let node = folder.make_node(ROOT, b"f", kind::FILE | 0o644, 0, ROOT_USER).unwrap().node;
    let owner = |owner, whole| LockOwner { node, owner, whole };
    let range = |start, end| LockRange { start, end };
    folder.lock(owner(1, false), LockKind::Exclusive, range(0, 9)).unwrap();
    assert_eq!(folder.lock(owner(2, false), LockKind::Shared, range(9, 20)), Err(Errno::AGAIN));
    folder.lock(owner(2, false), LockKind::Exclusive, range(10, 20)).unwrap();
    let found = folder.test_lock(owner(2, false), LockKind::Exclusive, range(0, 100)).unwrap();
    assert_eq!(found, Some((LockKind::Exclusive, range(0, 9))));
    folder.lock(owner(1, false), LockKind::Unlock, range(0, 9)).unwrap();
    folder.lock(owner(2, false), LockKind::Shared, range(0, i64::MAX as u64)).unwrap();
    folder.unlock_all(owner(2, false));
    folder.lock(owner(1, false), LockKind::Exclusive, range(0, u64::MAX)).unwrap();
    // The manner of flock is another one, which the host shares.
    folder.lock(owner(3, true), LockKind::Exclusive, range(0, 0)).unwrap();
    assert_eq!(folder.lock(owner(4, true), LockKind::Shared, range(0, 0)), Err(Errno::AGAIN));
    let host = std::fs::File::open(place.path("f")).unwrap();
    assert!(host.try_lock().is_err());
    folder.unlock_all(owner(3, true));
    host.try_lock().unwrap();
    assert_eq!(folder.lock(owner(4, true), LockKind::Shared, range(0, 0)), Err(Errno::AGAIN));
    assert_eq!(folder.lock(owner(1, false), LockKind::Shared, range(5, 4)), Err(Errno::INVAL));
    // A file that nobody holds has no locks.
    drop(host);
    folder.lock(owner(4, true), LockKind::Exclusive, range(0, 0)).unwrap();
    folder.forget(node, 1);
    std::fs::File::open(place.path("f")).unwrap().try_lock().unwrap();
}

#[test]
fn there_is_an_end_to_all_that_the_guest_can_hold() {
    let place = Place::new();
    let folder = place.share_with(Settings { descriptors: 96, ..SETTINGS });
    let node = folder.make_node(ROOT, b"f", kind::FILE | 0o644, 0, ROOT_USER).unwrap().node;
    let handles: Vec<_> = (0..1000).map_while(|_| folder.open_file(node, OFlags::RDONLY).ok()).collect();
    assert_eq!((handles.len(), folder.open_handles()), (32, 32));
    assert_eq!(folder.open_folder(ROOT), Err(Errno::NFILE));
    assert_eq!(folder.create(ROOT, b"new", OFlags::RDWR, 0o644, USER).unwrap_err(), Errno::NFILE);
    assert!(!place.path("new").exists());
    folder.close(handles[0]).unwrap();
    assert_eq!(folder.close(handles[0]), Err(Errno::BADF));
    folder.open_folder(ROOT).unwrap();
    let range = LockRange { start: 0, end: 0 };
    let lock = |owner| folder.lock(LockOwner { node, owner, whole: false }, LockKind::Shared, range);
    let locks = (0..1000).take_while(|&owner| lock(owner).is_ok()).count();
    assert_eq!(locks, 16);
    assert_eq!(lock(5000), Err(Errno::NOLCK));
    assert!(testing::descriptors_below(&place.path("")) <= 96);
}

#[test]
fn a_folder_is_listed_in_parts_while_it_changes() {
    let place = Place::new();
    let folder = place.share();
    for number in 0..300 {
        std::fs::write(place.path(&format!("{number}")), "").unwrap();
    }
    let handle = folder.open_folder(ROOT).unwrap();
    let (mut names, mut position) = (Vec::new(), 0);
    for round in 0.. {
        let (before, mut left) = (names.len(), 7);
        folder
            .list(handle, position, false, &mut |_, entry| {
                left -= 1;
                if left == 0 {
                    return Ok(false);
                }
                position = entry.next;
                if !entry.is_dots() {
                    names.push(String::from_utf8(entry.name.clone()).unwrap());
                }
                Ok(true)
            })
            .unwrap();
        if before == names.len() && left == 7 {
            break;
        }
        let _ = std::fs::remove_file(place.path(&format!("{}", 299 - round)));
        std::fs::write(place.path(&format!("new{round}")), "").unwrap();
    }
    names.retain(|name| !name.starts_with("new"));
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count, "no name twice");
    assert!((0..100).all(|number| names.contains(&number.to_string())), "what stays is there");
    assert!(folder.list(handle, u64::MAX, false, &mut |_, _| Ok(true)).is_err());
}

#[test]
fn a_race_of_folders_and_links_does_not_lead_outside() {
    let place = Place::new();
    let folder = place.share();
    let outside = place.outside("");
    let stop = AtomicBool::new(false);
    std::fs::create_dir(place.path("real")).unwrap();
    std::os::unix::fs::symlink(&outside, place.path("link")).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (real, link) = (place.path("real"), place.path("link"));
            while !stop.load(Ordering::Relaxed) {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(rustix::fs::CWD, &real, rustix::fs::CWD, &link, exchange).unwrap();
            }
        });
        for number in 0..3000 {
            for name in [b"real", b"link"] {
                let Ok(entry) = folder.lookup(ROOT, name) else { continue };
                let _ =
                    folder.create(entry.node, format!("{number}").as_bytes(), OFlags::RDWR, 0o644, ROOT_USER);
                let _ = folder.remove(entry.node, b"secret", false);
                let _ = folder.change(entry.node, None, &Changes { mode: Some(0o700), ..Changes::default() });
                assert!(folder.lookup(entry.node, b"secret").is_err());
                folder.forget(entry.node, 1);
            }
            folder.handles().clear();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(mode(&outside) & 0o777, 0o755);
    place.check_outside();
}

/// A folder that keeps everything, and the kind that its listing has for a name.
fn root_folder(place: &Place) -> Folder {
    place.share_with(Settings { keep_all: true, ..SETTINGS })
}

fn listed_kind(folder: &Folder, name: &str) -> u32 {
    let handle = folder.open_folder(ROOT).unwrap();
    let mut found = 0;
    let mut take = |_, entry: &DirEntry| {
        found = if entry.name == name.as_bytes() { entry.kind } else { found };
        Ok(true)
    };
    folder.list(handle, 0, true, &mut take).unwrap();
    folder.close(handle).unwrap();
    found
}

#[test]
fn links_pipes_and_sockets_of_others_are_files_on_the_host_where_everything_is_kept() {
    let place = Place::new();
    let folder = root_folder(&place);
    let link = folder.make_link(ROOT, b"link", b"../to here", USER).unwrap();
    let pipe = folder.make_node(ROOT, b"pipe", kind::FIFO | 0o620, 0, USER).unwrap();
    let socket = folder.make_node(ROOT, b"socket", kind::SOCKET | 0o755, 0, USER).unwrap();
    let modes = [kind::LINK | 0o777, kind::FIFO | 0o620, kind::SOCKET | 0o755];
    for ((name, entry), shown) in ["link", "pipe", "socket"].iter().zip([link, pipe, socket]).zip(modes) {
        let owner = Ownership { uid: 1000, gid: 100, mode: shown, rdev: 0 };
        assert_eq!(entry.attributes.owner, owner, "{name}");
        assert_eq!(folder.lookup(ROOT, name.as_bytes()).unwrap(), entry);
        assert_eq!(mode(&place.path(name)), kind::FILE | 0o600, "{name}: nobody else's on the host");
        assert_eq!(listed_kind(&folder, name), shown & kind::MASK);
    }
    assert_eq!(folder.read_link(link.node).unwrap(), b"../to here");
    assert_eq!(folder.read_link(pipe.node), Err(Errno::INVAL));
    assert_eq!(link.attributes.size, 10);
    // Root's are what they are.
    folder.make_link(ROOT, b"roots", b"x", ROOT_USER).unwrap();
    assert_eq!(mode(&place.path("roots")) & kind::MASK, kind::LINK);
    // Where not everything is kept the host sees links, whoever makes them.
    place.share().make_link(ROOT, b"users", b"x", USER).unwrap();
    assert_eq!(mode(&place.path("users")) & kind::MASK, kind::LINK);
}

#[test]
fn a_link_or_pipe_that_is_given_away_stays_the_same_for_the_guest() {
    let place = Place::new();
    let folder = root_folder(&place);
    let give = Changes { uid: Some(7), gid: Some(8), ..Changes::default() };
    std::os::unix::fs::symlink("target", place.path("link")).unwrap();
    let link = folder.lookup(ROOT, b"link").unwrap();
    let given = folder.change(link.node, None, &give).unwrap();
    assert_eq!((given.owner.uid, given.owner.gid, given.owner.mode), (7, 8, kind::LINK | 0o777));
    assert_eq!((given.modified, given.size), (link.attributes.modified, 6));
    assert_eq!(folder.read_link(link.node).unwrap(), b"target");
    assert_eq!(folder.lookup(ROOT, b"link").unwrap().node, link.node);
    let pipe = folder.make_node(ROOT, b"pipe", kind::FIFO | 0o600, 0, ROOT_USER).unwrap();
    let other = folder.link(pipe.node, ROOT, b"other").unwrap();
    assert_eq!(folder.change(other.node, None, &give), Err(Errno::PERM), "it has two names");
    folder.remove(ROOT, b"other", false).unwrap();
    folder.lookup(ROOT, b"pipe").unwrap();
    assert_eq!(folder.change(pipe.node, None, &give).unwrap().owner.mode, kind::FIFO | 0o600);
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 2, "nothing is left over");
    // Back to root, and away with it.
    let back = Changes { uid: Some(0), gid: Some(0), ..Changes::default() };
    assert_eq!(folder.change(link.node, None, &back).unwrap().owner.uid, 0);
    assert_eq!(folder.read_link(link.node).unwrap(), b"target");
    folder.remove(ROOT, b"link", false).unwrap();
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let place = Place::new();
    let folder = place.share();
    for (flags, linked) in [(OFlags::RDWR, Ok(())), (OFlags::RDWR | OFlags::EXCL, Err(Errno::NOENT))] {
        let (entry, handle) = match folder.create_unnamed(ROOT, flags, 0o640, USER) {
            Err(Errno::OPNOTSUPP) => return eprintln!("skipped: the host's file system has none"),
            made => made.unwrap(),
        };
        let owner = entry.attributes.owner;
        assert_eq!((owner.uid, owner.mode, entry.attributes.links), (1000, kind::FILE | 0o640, 0));
        std::os::unix::fs::FileExt::write_at(&*folder.file(handle).unwrap(), b"text", 0).unwrap();
        assert_eq!(folder.attributes(entry.node).unwrap().size, 4);
        assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 0);
        let named = folder.link(entry.node, ROOT, b"name").map(|named| assert_eq!(named.node, entry.node));
        assert_eq!(named, linked);
        if linked.is_ok() {
            assert_eq!(std::fs::read(place.path("name")).unwrap(), b"text");
            folder.remove(ROOT, b"name", false).unwrap();
            folder.forget(entry.node, 1);
        }
        folder.close(handle).unwrap();
        folder.forget(entry.node, 1);
        assert_eq!(folder.nodes().len(), 1);
    }
    assert_eq!(folder.create_unnamed(ROOT, OFlags::RDONLY, 0o640, USER).unwrap_err(), Errno::INVAL);
}

#[test]
fn what_is_beside_a_file_cannot_make_it_anything_that_there_is_not() {
    let place = Place::new();
    let folder = root_folder(&place);
    for (number, text) in
        ["uid=1,gid=1,mode=755,rdev=0", "uid=1,gid=1,mode=40755,rdev=0", "uid=1,gid=1,mode=7777777,rdev=0"]
            .iter()
            .enumerate()
    {
        let name = format!("f{number}");
        std::fs::write(place.path(&name), "").unwrap();
        let value = text.as_bytes();
        rustix::fs::setxattr(place.path(&name), ownership::OVERRIDE, value, rustix::fs::XattrFlags::empty())
            .unwrap();
        let shown = folder.lookup(ROOT, name.as_bytes()).unwrap().attributes.owner.mode;
        assert_eq!(shown & kind::MASK, kind::FILE, "{text}");
    }
}
