//! Where the ports of the virtio console lead on the host: the terminal, files, sockets, pseudo-terminals.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::serial::SerialOutput;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use virtio::console::PortHandle;

use crate::config::{PortBackend, PortConfig};
use crate::error::BuildError;
use crate::input::Port;
use crate::outcome::Ending;
use crate::output::Output;
use crate::unix_socket::{self, Listener, OwnedPath, readable};

/// How long to wait before something is tried again.
const PAUSE: Duration = Duration::from_millis(10);
/// How often an output that is full is tried after the run has ended.
const LAST_TRIES: u32 = 20;

/// A port's end on the host, open and not yet at work.
pub enum Backend {
    /// What the guest sends goes into the file.
    File(File),
    /// One client at a time.
    Socket(Listener),
    /// A pseudo-terminal, with the link to it.
    Pty(Pty),
}

/// Both ends of a pseudo-terminal, and the link by which others find it. The user's end is kept, so that the device does not
/// go away between two programs that use it.
pub struct Pty {
    ours: File,
    _theirs: OwnedFd,
    _link: OwnedPath,
}

impl Backend {
    /// Opens what a port leads to.
    ///
    /// # Errors
    /// [`BuildError::Output`].
    pub fn open(config: &PortConfig) -> Result<Self, BuildError> {
        let path = &config.path;
        let failed = |source| BuildError::Output { path: path.clone(), source };
        Ok(match config.backend {
            PortBackend::File => {
                let file =
                    File::options().create(true).write(true).truncate(true).open(path).map_err(failed)?;
                Self::File(file)
            }
            PortBackend::Socket => Self::Socket(Listener::bind(path)?),
            PortBackend::Pty => Self::Pty(open_pty(path).map_err(failed)?),
        })
    }

    /// Starts the thread that moves the port's bytes until the machine closes it.
    ///
    /// # Errors
    /// The host's, where it gives no thread.
    pub fn start(self, name: &str, port: PortHandle, ending: &Ending) -> io::Result<JoinHandle<()>> {
        let (ending, told) = (ending.clone(), name.to_owned());
        std::thread::Builder::new().name("port".into()).spawn(move || {
            let done = match self {
                Self::File(file) => write_out(file, &port),
                Self::Socket(listener) => serve(&listener, &port, &ending),
                Self::Pty(pty) => pty.ours.try_clone().and_then(|ours| move_both(ours, &port, &ending)),
            };
            if let Err(error) = done {
                log::error!("port {told}: {error}; what the guest sends there is lost");
            }
            port.set_host_open(false);
        })
    }
}

/// Makes a pseudo-terminal and the link to it, in the place of one whose terminal is gone: what a killed process leaves.
fn open_pty(link: &Path) -> io::Result<Pty> {
    let _alone = unix_socket::lock_folder(link);
    if let Ok(meta) = std::fs::symlink_metadata(link) {
        if !meta.is_symlink() {
            return Err(io::Error::new(
                ErrorKind::AlreadyExists,
                "it is there already, and no link to a terminal",
            ));
        }
        if link.exists() {
            let reason =
                "it is a link already, to something that is there: another process's terminal perhaps";
            return Err(io::Error::new(ErrorKind::AlreadyExists, reason));
        }
        std::fs::remove_file(link)?;
    }
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let theirs = rustix::fs::open(&name, flags, rustix::fs::Mode::empty())?;
    let mut settings = tcgetattr(&theirs)?;
    settings.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &settings)?;
    std::os::unix::fs::symlink(Path::new(&*name.to_string_lossy()), link)?;
    Ok(Pty { ours: ours.into(), _theirs: theirs, _link: OwnedPath::new(link)? })
}

fn write_out(mut file: File, port: &PortHandle) -> io::Result<()> {
    port.set_host_open(true);
    let mut data = Vec::new();
    while port.read(&mut data) {
        file.write_all(&data)?;
        data.clear();
    }
    Ok(())
}

/// One client after another.
fn serve(listener: &Listener, port: &PortHandle, ending: &Ending) -> io::Result<()> {
    while let Some(client) = listener.accept(ending) {
        let moved = move_both(File::from(OwnedFd::from(client)), port, ending);
        port.set_host_open(false);
        if let Err(error) = moved {
            log::debug!("a port's client: {error}");
        }
    }
    Ok(())
}

/// Moves bytes both ways until the other side closes the connection or the machine ends.
fn move_both(connection: File, port: &PortHandle, ending: &Ending) -> io::Result<()> {
    // One who does not read must not keep the machine from ending.
    rustix::io::ioctl_fionbio(&connection, true)?;
    let gone = Arc::new(AtomicBool::new(false));
    let (mut from, input, at_end, over) =
        (connection.try_clone()?, port.clone(), gone.clone(), ending.clone());
    let reader = std::thread::Builder::new().name("port-in".into()).spawn(move || {
        let mut buffer = [0; 4096];
        while !over.has_come() && !at_end.load(Ordering::SeqCst) {
            if !readable(&from) {
                continue;
            }
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => give(&input, &buffer[..count], &over, &at_end),
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(_) => break,
            }
        }
        at_end.store(true, Ordering::SeqCst);
    })?;
    port.set_host_open(true);
    let written = write_while(connection, port, (&gone, ending));
    gone.store(true, Ordering::SeqCst);
    // It ends within a moment; a panic there has nothing to say here.
    let _ = reader.join();
    written
}

/// Passes the guest's output on until the other side is gone, or there is no more; one who does not read it gets another
/// moment after the machine's end.
fn write_while(
    mut connection: File,
    port: &PortHandle,
    (gone, ending): (&AtomicBool, &Ending),
) -> io::Result<()> {
    let (mut data, mut tries) = (Vec::new(), 0);
    while !gone.load(Ordering::SeqCst) && port.read_within(&mut data, 10 * PAUSE) {
        let mut rest = &data[..];
        while !rest.is_empty() && !gone.load(Ordering::SeqCst) {
            match connection.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    tries += u32::from(ending.has_come());
                    if tries > LAST_TRIES {
                        return Err(error);
                    }
                    std::thread::sleep(PAUSE);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        data.clear();
    }
    Ok(())
}

/// Gives the guest what came, as it takes it.
fn give(port: &PortHandle, mut data: &[u8], ending: &Ending, gone: &AtomicBool) {
    while !data.is_empty() && !ending.has_come() && !gone.load(Ordering::SeqCst) {
        let count = port.write(data);
        data = &data[count..];
        if count == 0 {
            port.wait(PAUSE);
        }
    }
}

/// Passes the terminal's output on to where the machine's output goes.
///
/// # Errors
/// The host's, where it gives no thread.
pub fn pass_on(port: PortHandle, mut output: Output, ending: &Ending) -> io::Result<JoinHandle<()>> {
    let ending = ending.clone();
    std::thread::Builder::new().name("console".into()).spawn(move || {
        let (mut data, mut tries) = (Vec::new(), 0);
        while port.read(&mut data) {
            let mut rest = &data[..];
            while !rest.is_empty() {
                let count = output.accept(rest);
                rest = &rest[count..];
                if count == 0 {
                    tries += u32::from(ending.has_come());
                    if tries > LAST_TRIES {
                        return;
                    }
                    std::thread::sleep(PAUSE);
                }
            }
            data.clear();
        }
    })
}

/// The terminal as the input's thread feeds it.
pub struct TerminalPort(pub PortHandle);

impl Port for TerminalPort {
    fn is_open(&self) -> bool {
        self.0.is_open()
    }
    fn push(&self, data: &[u8]) -> usize {
        self.0.write(data)
    }
    /// What the driver has taken into its buffers is the guest's.
    fn is_empty(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Outcome;
    use std::os::unix::net::UnixStream;
    use virtio::console::{Console, PortKind};
    use virtio::testing::{BUFFERS, Rig};

    const MULTIPORT: u64 = 2;

    struct Bench {
        rig: Rig,
        handle: virtio::console::ConsoleHandle,
        ending: Ending,
        thread: JoinHandle<()>,
    }

    /// A port whose guest side is open, leading to `path`.
    fn bench(path: &Path, backend: PortBackend) -> Bench {
        let (console, handle) = Console::new(vec![PortKind::Channel("a".into())], (0, 0));
        let mut rig = Rig::new(Box::new(console), 16, MULTIPORT);
        // PORT_OPEN of port 0.
        rig.drivers[0].put(BUFFERS, &[0, 0, 0, 0, 6, 0, 1, 0]);
        rig.send(3, &[(BUFFERS, 8, false)]);
        rig.send(0, &[(BUFFERS + 0x100, 64, true)]);
        let config = PortConfig { name: "a".into(), path: path.to_owned(), backend };
        let ending = Ending::new();
        let backend = Backend::open(&config).unwrap();
        let thread = backend.start("a", handle.port(0).unwrap(), &ending).unwrap();
        Bench { rig, handle, ending, thread }
    }

    impl Bench {
        fn send(&mut self, text: &[u8]) {
            self.rig.drivers[0].put(BUFFERS, text);
            self.rig.send(1, &[(BUFFERS, text.len() as u32, false)]);
            self.rig.wait_used(1);
        }

        fn end(self) {
            self.ending.report(Outcome::PowerOff);
            self.handle.close();
            self.thread.join().unwrap();
        }
    }

    /// Until the host's side is there, output is lost.
    fn send_until<T>(bench: &mut Bench, mut seen: impl FnMut() -> Option<T>) -> T {
        for _ in 0..500 {
            bench.send(b"x");
            if let Some(value) = seen() {
                return value;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("nothing came");
    }

    #[test]
    fn a_file_gets_what_the_guest_sends() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bench = bench(file.path(), PortBackend::File);
        let path = file.path().to_owned();
        send_until(&mut bench, || (!std::fs::read(&path).unwrap().is_empty()).then_some(()));
        bench.send(b"hello");
        bench.end();
        assert!(std::fs::read(file.path()).unwrap().ends_with(b"xhello"));
    }

    #[test]
    fn a_sockets_clients_talk_to_the_guest_one_after_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("port");
        let mut bench = bench(&path, PortBackend::Socket);
        for text in [b"one", b"two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
            let mut byte = [0];
            send_until(&mut bench, || client.read(&mut byte).is_ok_and(|count| count == 1).then_some(()));
            assert_eq!(byte, *b"x");
            client.write_all(text).unwrap();
            assert_eq!(bench.rig.wait_used(0).1, 3);
            assert_eq!(bench.rig.drivers[0].bytes(BUFFERS + 0x100, 3), text);
            bench.rig.send(0, &[(BUFFERS + 0x100, 64, true)]);
        }
        bench.end();
        assert!(!path.exists());
    }

    #[test]
    fn a_pseudo_terminal_is_found_by_its_link() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tty");
        let mut bench = bench(&path, PortBackend::Pty);
        let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
        terminal.write_all(b"abc").unwrap();
        assert_eq!(bench.rig.wait_used(0).1, 3);
        send_until(&mut bench, || readable(&terminal).then_some(()));
        let mut byte = [0];
        terminal.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        bench.end();
        assert!(std::fs::symlink_metadata(&path).is_err());
    }

    #[test]
    fn a_link_whose_terminal_is_gone_is_replaced_and_one_to_something_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tty");
        std::os::unix::fs::symlink("/dev/pts/999999", &path).unwrap();
        let terminal = open_pty(&path).unwrap();
        assert!(path.exists());
        assert!(open_pty(&path).err().unwrap().to_string().contains("a link already"));
        drop(terminal);
        assert!(std::fs::symlink_metadata(&path).is_err());
    }

    #[test]
    fn clients_that_do_not_read_do_not_keep_the_machine_from_ending() {
        let folder = tempfile::tempdir().unwrap();
        for backend in [PortBackend::Socket, PortBackend::Pty] {
            let path = folder.path().join("port");
            let mut bench = bench(&path, backend);
            let client: Box<dyn std::any::Any> = match backend {
                PortBackend::Socket => Box::new(UnixStream::connect(&path).unwrap()),
                _ => Box::new(File::open(&path).unwrap()),
            };
            // Until the guest's requests are not given back: nobody takes more.
            bench.rig.drivers[0].put(BUFFERS + 0x1000, &[b'x'; 4096]);
            let mut waiting = 0;
            while waiting < 8 {
                bench.rig.send(1, &[(BUFFERS + 0x1000, 4096, false)]);
                waiting += 1;
                std::thread::sleep(Duration::from_millis(5));
                while bench.rig.drivers[1].used().is_some() {
                    waiting -= 1;
                }
            }
            bench.end();
            drop(client);
        }
    }

    #[test]
    fn what_cannot_be_opened_is_told_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there");
        std::fs::write(&there, "x").unwrap();
        for (path, backend) in [
            (folder.path(), PortBackend::File),
            (&there, PortBackend::Socket),
            (&there, PortBackend::Pty),
            (Path::new("/nonexistent/port"), PortBackend::Socket),
        ] {
            let config = PortConfig { name: "a".into(), path: path.to_owned(), backend };
            let refused = Backend::open(&config).err().unwrap().to_string();
            assert!(refused.contains(path.to_str().unwrap()), "{refused}");
        }
        assert_eq!(std::fs::read(&there).unwrap(), b"x");
    }
}
