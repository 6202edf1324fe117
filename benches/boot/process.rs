//! Runs one monitor and notes when its guest said what.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// How often a process and a console in a file are looked at; what the times are exact to.
const POLL: Duration = Duration::from_millis(2);

/// Where the guest's console comes out.
pub enum Console {
    /// On the process's standard output.
    Stdout,
    /// In a file, while the process itself has a terminal.
    File(PathBuf),
}

/// What to run, and what to look for.
pub struct Job {
    /// The monitor with its arguments.
    pub command: Command,
    /// Where its guest's console comes out.
    pub console: Console,
    /// Texts whose first appearance on the console is timed.
    pub marks: Vec<&'static str>,
    /// End the process at the last mark instead of waiting for it.
    pub stop_at_last_mark: bool,
}

/// What came of it.
pub struct Finished {
    /// From the start of the process to its end.
    pub elapsed: Duration,
    /// Processor time of the process, user and system.
    pub cpu: Duration,
    /// When each mark appeared, counted from the start of the process.
    pub marks: Vec<Option<Duration>>,
    /// Everything that the guest's console said.
    pub console: String,
    /// Everything on standard error (with a console in a file: on the terminal).
    pub errors: String,
}

impl Job {
    /// Runs it to its end.
    ///
    /// # Errors
    /// Where the process cannot be started or does not end in time.
    pub fn run(mut self, timeout: Duration) -> anyhow::Result<Finished> {
        let program = self.command.get_program().to_string_lossy().into_owned();
        let mut pty = None;
        match &self.console {
            Console::Stdout => {
                self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            Console::File(path) => {
                File::create(path).with_context(|| path.display().to_string())?;
                pty = Some(attach_terminal(&mut self.command)?);
            }
        }
        let started = Instant::now();
        let mut child = self.command.spawn().with_context(|| format!("cannot start {program}"))?;
        // The command keeps the terminal's other end open, which would keep its reader waiting.
        drop(std::mem::replace(&mut self.command, Command::new("true")));
        let errors = match (pty, child.stderr.take()) {
            (Some(terminal), _) => collect(File::from(terminal)),
            (None, Some(stderr)) => collect(stderr),
            (None, None) => bail!("{program} has no standard error"),
        };
        let source = match self.console {
            Console::Stdout => Source::Pipe(forward(child.stdout.take().context("no standard output")?)),
            Console::File(path) => Source::File(File::open(path)?),
        };
        let mut watch = Watch::new(self.marks, started);
        let ended = watch.follow(&mut child, source, self.stop_at_last_mark, timeout);
        let cpu = cpu_time(&child);
        child.wait()?;
        let errors = errors.recv_timeout(Duration::from_secs(2)).unwrap_or_default();
        let Some(ended) = ended? else {
            bail!("no end within {} s; its console ends with {:?}", timeout.as_secs(), tail(&watch.text));
        };
        Ok(Finished { elapsed: ended - started, cpu: cpu?, marks: watch.seen, console: watch.text, errors })
    }
}

/// A terminal of its own for a program that insists on one; the end to read from.
fn attach_terminal(command: &mut Command) -> anyhow::Result<OwnedFd> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&controller)?;
    unlockpt(&controller)?;
    let name = ptsname(&controller, Vec::new())?;
    let terminal = File::options().read(true).write(true).open(name.to_str()?)?;
    command.env("TERM", "vt100");
    command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
    Ok(controller)
}

/// Where the console's bytes come from.
enum Source {
    Pipe(Receiver<(Instant, Vec<u8>)>),
    File(File),
}

/// Passes on what is read, with the time.
fn forward(mut from: impl Read + Send + 'static) -> Receiver<(Instant, Vec<u8>)> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if sender.send((Instant::now(), buffer[..len].to_vec())).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Reads everything.
fn collect(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A terminal whose other end is closed gives an error where a pipe gives its end.
        let _ = from.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// The console so far.
struct Watch {
    marks: Vec<&'static str>,
    seen: Vec<Option<Duration>>,
    text: String,
    started: Instant,
}

impl Watch {
    fn new(marks: Vec<&'static str>, started: Instant) -> Self {
        Self { seen: vec![None; marks.len()], marks, text: String::new(), started }
    }

    /// Until the process has ended: when that was. `None` where it had to be killed.
    fn follow(
        &mut self,
        child: &mut Child,
        mut source: Source,
        stop_at_last_mark: bool,
        timeout: Duration,
    ) -> anyhow::Result<Option<Instant>> {
        let mut stopped = None;
        loop {
            // Looked at first: what was written before the end is then read below.
            let ended = has_ended(child)?.then(Instant::now);
            self.read(&mut source);
            if let Some(ended) = ended {
                return Ok(Some(stopped.unwrap_or(ended)));
            }
            let late = self.started.elapsed() > timeout;
            if late || stop_at_last_mark && stopped.is_none() && self.seen.last().is_some_and(Option::is_some)
            {
                child.kill()?;
                if late {
                    return Ok(None);
                }
                stopped = Some(Instant::now());
            }
        }
    }

    /// Takes what there is; waits a moment where there is nothing.
    fn read(&mut self, source: &mut Source) {
        match source {
            Source::Pipe(pipe) => {
                match pipe.recv_timeout(POLL) {
                    Ok((when, bytes)) => self.take(when, &bytes),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => std::thread::sleep(POLL),
                }
                while let Ok((when, bytes)) = pipe.try_recv() {
                    self.take(when, &bytes);
                }
            }
            Source::File(file) => {
                let mut bytes = Vec::new();
                let at = file.stream_position().unwrap_or(0);
                match file.read_to_end(&mut bytes) {
                    Ok(0) => std::thread::sleep(POLL),
                    Ok(_) => self.take(Instant::now(), &bytes),
                    Err(_) => drop(file.seek(SeekFrom::Start(at))),
                }
            }
        }
    }

    fn take(&mut self, when: Instant, bytes: &[u8]) {
        self.text.push_str(&String::from_utf8_lossy(bytes));
        for (mark, seen) in self.marks.iter().zip(&mut self.seen) {
            if seen.is_none() && self.text.contains(mark) {
                *seen = Some(when - self.started);
            }
        }
    }
}

/// Whether a process has ended. It is left to be waited for, so that its times can still be read.
fn has_ended(child: &Child) -> anyhow::Result<bool> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    Ok(waitid(WaitId::Pid(pid(child)?), options)?.is_some())
}

fn pid(child: &Child) -> anyhow::Result<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a process without a number")
}

/// User and system time of a process that was not waited for yet. proc(5), */proc/pid/stat*.
fn cpu_time(child: &Child) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
    // The name, in parentheses, may hold spaces; utime and stime are the 14th and 15th field, the state the 3rd.
    let fields: Vec<&str> =
        stat.rsplit_once(')').context("stat without a name")?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    let ticks = ticks(11).zip(ticks(12)).map(|(user, system)| user + system).context("stat without times")?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// The end of a text, for a message.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
    lines
        .into_iter()
        .rev()
        .map(|line| line.chars().take(200).collect::<String>())
        .collect::<Vec<_>>()
        .join("\n")
}
