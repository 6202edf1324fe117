//! The installation: the default guest runs `install.sh` with the new disk and its source attached.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use disk::{Format, Options};
use vmm::boot::Protocol;
use vmm::config::{Boot, BootConfig, DiskConfig, MachineConfig};
use vmm::machine::SerialLine;
use vmm::{Machine, Outcome};

use super::super::{GuestError, Progress, catalog, initramfs, software};
use super::source::Source;
use super::{LABEL, Observer, RootDisk};

/// What the guest runs.
const SCRIPT: &str = include_str!("install.sh");
/// The port that it reports its status at.
const STATUS_PORT: u16 = 0xf4;
/// RAM besides what a batch of packages takes, in bytes.
const MEMORY: u64 = 768 << 20;
/// A package's part in dpkg's records, which are in RAM too, is not more than this part of its bytes.
const RECORDS: u64 = 16;
/// The longest line that is read from the guest, in bytes.
const MAX_LINE: u64 = 4096;
/// Lines of its errors that are kept.
const KEPT_LINES: usize = 40;

/// Who may log in on the console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Login {
    /// An ordinary user with sudo.
    pub user: Option<String>,
    /// The user's password, or root's where there is no user.
    pub password: Option<String>,
    /// Whether the console logs in by itself: the user, or root where there is none.
    pub automatic: bool,
}

/// What the installation works with.
pub struct Job<'a> {
    pub disk: &'a RootDisk,
    /// The empty image.
    pub image: Options,
    pub source: &'a File,
    pub layout: &'a Source,
    /// Names of the packages in the source, in its order.
    pub packages: &'a [String],
}

/// Runs it to its end.
///
/// # Errors
/// [`GuestError::Install`] with what the guest said last, and [`GuestError::Cancelled`].
pub fn run(job: &Job<'_>, observer: &mut Observer<'_>) -> Result<(), GuestError> {
    let config = configure(job, observer)?;
    let (sender, lines) = sync_channel(64);
    let errors = sender.clone();
    let pipe = |tag: fn(String) -> Line, sender: SyncSender<Line>| -> Result<SerialLine, GuestError> {
        let (reader, writer) = io::pipe().map_err(failed)?;
        std::thread::spawn(move || pass_on(reader, tag, &sender));
        Ok(SerialLine { output: Box::new(writer), input: None })
    };
    let console = SerialLine { output: Box::new(io::sink()), input: None };
    let serial = vec![console, pipe(Line::Said, sender)?, pipe(Line::Error, errors)?];
    let machine = Machine::build(&config, serial).map_err(failed)?;
    (observer.started)(machine.controls());
    let mut story = Story::new(job);
    let summary = std::thread::scope(|scope| {
        let running = scope.spawn(|| machine.run());
        story.follow(&lines, observer);
        running.join()
    });
    observer.progress.end();
    let summary = summary.map_err(|_| failed("the machine's thread ended"))?.map_err(failed)?;
    story.ended(&summary.outcome)
}

fn failed(reason: impl ToString) -> GuestError {
    GuestError::Install { reason: reason.to_string() }
}

fn configure(job: &Job<'_>, observer: &mut Observer<'_>) -> Result<MachineConfig, GuestError> {
    let name = catalog::GUESTS[0].name;
    let files = match super::super::locate(name) {
        Some(files) => files,
        None => super::super::fetch(name, observer.progress)?,
    };
    let tools = ["e2fsprogs".to_owned()];
    let tools = software::with_packages(name, &files, &tools, observer.progress)?;
    let script = format!("{}{SCRIPT}", settings(job));
    let disk = |image: Options| DiskConfig { image, serial: String::new(), limits: Default::default() };
    // The source has no name any more.
    let source = Options::reading(format!("/proc/self/fd/{}", job.source.as_raw_fd()));
    let source = Options { format: Some(Format::Raw), ..source };
    let records = job.layout.sizes.iter().sum::<u64>() / RECORDS;
    let packages = 2 * job.layout.longest_batch() + records;
    let memory = MEMORY + (packages + 3 * tools.bytes).next_multiple_of(1 << 20);
    let boot = Boot::Kernel(BootConfig {
        kernel: files.kernel,
        initrd: Some(tools.initrd),
        modules: Vec::new(),
        overlay: initramfs::exec_overlay(&script),
        cmdline: files.cmdline,
        protocol: Protocol::Auto,
    });
    Ok(MachineConfig {
        memory,
        disks: vec![disk(job.image.clone()), disk(source)],
        rng: true,
        debug_exit: Some(STATUS_PORT),
        ..MachineConfig::new(boot)
    })
}

/// The script's settings, as shell assignments.
fn settings(job: &Job<'_>) -> String {
    let Login { user, password, automatic } = &job.disk.login;
    let segments: Vec<_> = job.layout.segments.iter().map(|(at, count)| format!("{at} {count}")).collect();
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let autologin = match (automatic, user) {
        (false, _) => String::new(),
        (true, Some(user)) => user.clone(),
        (true, None) => "root".to_owned(),
    };
    let settings = [
        ("segments", segments.join(" ")),
        ("label", LABEL.to_owned()),
        ("host", job.disk.hostname.clone()),
        ("user", text(user)),
        ("password", text(password)),
        ("autologin", autologin),
    ];
    settings.iter().map(|(name, value)| format!("{name}={}\n", quoted(value))).collect()
}

/// A word for the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// What the guest sends.
enum Line {
    /// On its output.
    Said(String),
    /// On its error output.
    Error(String),
}

fn pass_on(reader: impl Read, tag: fn(String) -> Line, sender: &SyncSender<Line>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if sender.send(tag(text)).is_err() {
            break;
        }
        line.clear();
    }
}

/// What has happened so far.
struct Story<'a> {
    /// Bytes of each package.
    sizes: BTreeMap<&'a str, u64>,
    total: u64,
    /// Packages that have come through the present step, and their bytes.
    seen: BTreeSet<&'a str>,
    done: u64,
    finished: bool,
    errors: VecDeque<String>,
}

impl<'a> Story<'a> {
    fn new(job: &Job<'a>) -> Self {
        let sizes = job.packages.iter().map(String::as_str).zip(job.layout.sizes.iter().copied());
        Self {
            sizes: sizes.collect(),
            total: job.layout.sizes.iter().sum(),
            seen: BTreeSet::new(),
            done: 0,
            finished: false,
            errors: VecDeque::new(),
        }
    }

    /// Until the machine closes its lines.
    fn follow(&mut self, lines: &Receiver<Line>, observer: &mut Observer<'_>) {
        for line in lines {
            match line {
                Line::Said(line) => match line.strip_prefix("ringside: ") {
                    Some(said) => self.said(said, observer),
                    None => log::info!("{line}"),
                },
                Line::Error(line) => {
                    log::info!("{line}");
                    self.errors.push_back(line);
                    if self.errors.len() > KEPT_LINES {
                        self.errors.pop_front();
                    }
                }
            }
        }
    }

    fn said(&mut self, line: &str, observer: &mut Observer<'_>) {
        let count = self.sizes.len();
        let progress = &mut *observer.progress;
        let (word, name) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "format" => progress.begin("Making the file system", None),
            "unpack" => self.begin(&format!("Installing {count} packages"), progress),
            "configure" => self.begin(&format!("Configuring {count} packages"), progress),
            "unpacked" | "installed" => {
                let name = name.split_once(':').map_or(name, |(name, _)| name);
                if let Some((&name, size)) = self.sizes.get_key_value(name)
                    && self.seen.insert(name)
                {
                    self.done += size;
                    progress.advance(self.done);
                }
            }
            "finish" => progress.begin("Finishing the disk", None),
            "done" => self.finished = true,
            _ => {}
        }
    }

    fn begin(&mut self, what: &str, progress: &mut dyn Progress) {
        (self.seen, self.done) = (BTreeSet::new(), 0);
        progress.begin(what, Some(self.total));
    }

    fn ended(self, outcome: &Outcome) -> Result<(), GuestError> {
        match outcome {
            Outcome::DebugExit(0) if self.finished => Ok(()),
            Outcome::Stopped(_) => Err(GuestError::Cancelled),
            Outcome::DebugExit(_) => {
                let said: Vec<String> = self.errors.into();
                Err(failed(if said.is_empty() { "the guest said nothing".into() } else { said.join("\n") }))
            }
            outcome => Err(failed(outcome)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cancelled;
    use super::*;

    #[derive(Default)]
    struct Heard(Vec<String>);

    impl Progress for Heard {
        fn note(&mut self, _: &str) {}
        fn begin(&mut self, what: &str, bytes: Option<u64>) {
            self.0.push(format!("{what} {bytes:?}"));
        }
        fn advance(&mut self, bytes: u64) {
            self.0.push(bytes.to_string());
        }
        fn end(&mut self) {}
    }

    fn disk(login: Login) -> RootDisk {
        RootDisk { packages: Vec::new(), size: 1 << 30, hostname: "it's".into(), login }
    }

    fn told(lines: &[Line], outcome: Outcome) -> (Vec<String>, Result<(), GuestError>) {
        let layout = Source { segments: vec![(0, 1), (1, 2)], sizes: vec![5, 7] };
        let packages = ["libc6".to_owned(), "bash".to_owned()];
        let (disk, file) = (disk(Login::default()), tempfile::tempfile().unwrap());
        let job = Job {
            disk: &disk,
            image: Options::new("/x"),
            source: &file,
            layout: &layout,
            packages: &packages,
        };
        let mut story = Story::new(&job);
        let (sender, receiver) = sync_channel(lines.len());
        for line in lines {
            let line = match line {
                Line::Said(text) => Line::Said(text.clone()),
                Line::Error(text) => Line::Error(text.clone()),
            };
            sender.send(line).unwrap();
        }
        drop(sender);
        let mut heard = Heard::default();
        let (cancelled, progress) = (Cancelled::never(), &mut heard);
        let mut observer = Observer { progress, cancelled, fetched: &|| {}, started: &|_| {} };
        story.follow(&receiver, &mut observer);
        (heard.0, story.ended(&outcome))
    }

    fn said(text: &str) -> Line {
        Line::Said(format!("ringside: {text}"))
    }

    #[test]
    fn dpkgs_status_lines_become_progress_and_each_package_counts_once() {
        let lines = [
            said("unpack"),
            said("unpacked libc6:amd64"),
            said("unpacked libc6:amd64"),
            said("unpacked nobody"),
            said("unpacked bash"),
            said("configure"),
            said("installed bash"),
            said("done"),
        ];
        let (heard, ended) = told(&lines, Outcome::DebugExit(0));
        let expected = ["Installing 2 packages Some(12)", "5", "12", "Configuring 2 packages Some(12)", "7"];
        assert_eq!(heard, expected);
        assert!(ended.is_ok());
    }

    #[test]
    fn a_failure_tells_what_the_guest_said_last() {
        let lines = [said("unpack"), Line::Error("dpkg: error: no space".into())];
        let error = told(&lines, Outcome::DebugExit(1)).1.unwrap_err().to_string();
        assert!(error.contains("no space"), "{error}");
        assert!(told(&[], Outcome::DebugExit(0)).1.is_err(), "it did not say that it was done");
        assert!(told(&[said("done")], Outcome::PowerOff).1.is_err());
        let stopped = Outcome::Stopped(vmm::StopReason::Signal(2));
        assert!(matches!(told(&[], stopped).1, Err(GuestError::Cancelled)));
    }

    #[test]
    fn settings_are_words_of_the_shell_whatever_they_hold() {
        let layout = Source { segments: vec![(0, 3), (3, 4)], sizes: Vec::new() };
        let login =
            Login { user: Some("ann".into()), password: Some("a'b $(x)\"\\".into()), automatic: true };
        let (disk, file) = (disk(login), tempfile::tempfile().unwrap());
        let job =
            Job { disk: &disk, image: Options::new("/x"), source: &file, layout: &layout, packages: &[] };
        let script =
            format!("{}printf '%s|' \"$segments\" \"$host\" \"$password\" \"$autologin\"", settings(&job));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "0 3 3 4|it's|a'b $(x)\"\\|ann|");
    }
}
