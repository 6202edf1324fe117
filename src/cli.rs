//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::ArgPredicate::IsPresent;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use ringside::guest::root_disk;
use vmm::config::{
    BalloonConfig, DiskConfig, FwCfgFile, FwCfgSource, GUEST_CIDS, MAX_CPUS, MAX_MEMORY, MIN_MEMORY,
    ModuleConfig, PmemConfig, PortConfig, ShareConfig, VIRTIO_FEATURES, VsockConfig,
};

use crate::device_options;
use crate::disk_options::{self, DiskCommand};
use crate::{exit_status, share_options, size};

const EXAMPLES: &str = "\
Examples:
  ringside                                  boot the default guest, Debian, to a shell
  ringside run --exec 'uname -a; nproc' --cpus 2
                                            run a command in it; its output, its status
  ringside run --guest debian-cloud --memory 1G --exits json=exits.json
  ringside run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0'
  ringside run --package python3 --exec 'python3 --version'
                                            with Debian's packages in the guest
  ringside run --share . --exec 'ls /mnt/share'
                                            with a folder of the host in the guest
  echo 'dmesg | tail' | ringside            a script on stdin; its end powers off
  ringside guest build debian -o disk.img   a disk with Debian on it, to work in; then:
  ringside run --disk disk.img              boot it to a login
  ringside guest list                       the guests that can be had by name

Keys at a terminal: Ctrl-A x ends the run, Ctrl-A h lists the others.";

/// A virtual machine monitor for x86-64 that runs anywhere and accounts for every exit.
///
/// Without a subcommand it does what `ringside run` does: it boots Debian Linux on this terminal (and fetches it
/// first, once). It needs neither root nor /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "ringside", version)]
#[command(after_help = EXAMPLES, after_long_help = long_help())]
pub struct Cli {
    /// What to do; `run` by default
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The options of `run`.
    #[command(flatten)]
    pub run: RunArgs,
    /// Say more on stderr: -v what is done, -vv details, -vvv everything
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,
}

impl Cli {
    /// Parses the command line, its first word the program's name.
    ///
    /// # Errors
    /// clap's, which is also how it shows help and version.
    pub fn read(line: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let matches = command.try_get_matches_from_mut(line)?;
        if let (Some(option), Some((subcommand, _))) = (misplaced(&matches), matches.subcommand()) {
            let option = option.replace('_', "-");
            let message = format!("write --{option} after `{subcommand}`, not before it");
            return Err(command.error(ErrorKind::ArgumentConflict, message));
        }
        Self::from_arg_matches(&matches)
    }
}

/// An option of `run` that stands before a subcommand, where it would count for nothing.
fn misplaced(matches: &ArgMatches) -> Option<String> {
    let given = |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
    let of_run = |id: &&clap::Id| !matches!(id.as_str(), "verbose" | "Cli" | "RunArgs");
    matches.ids().filter(of_run).find(given).map(|id| id.as_str().to_owned())
}

fn long_help() -> String {
    format!("{EXAMPLES}\n\n{}", exit_status::HELP)
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest
    ///
    /// Boot a guest: by default Debian's kernel with a busybox, fetched once and kept under the cache folder
    /// ($RINGSIDE_CACHE, or ringside below $XDG_CACHE_HOME or ~/.cache).
    #[command(after_help = EXAMPLES, after_long_help = long_help())]
    Run(Box<RunArgs>),
    /// Fetch, list or remove the guests that can be had by name
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Create, look at, convert, resize or check disk images
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Tell how a running guest's balloon is, or change its size
    ///
    /// The guest was started with --balloon control=SOCKET.
    Balloon {
        /// The socket
        socket: PathBuf,
        /// What the balloon is to take of the guest's memory: 256M; 0 for nothing
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
    },
}

/// What can be done with named guests.
#[derive(Debug, Subcommand)]
pub enum GuestCommand {
    /// Download a guest, unless it is here and undamaged
    ///
    /// `ringside guest remove` and another fetch give the newest that Debian has.
    Fetch {
        /// Which one; see `ringside guest list`
        #[arg(default_value = DEFAULT_GUEST)]
        name: String,
        /// Also these Debian packages and what they need, for `ringside run --package`
        #[arg(long = "package", value_name = "NAME", value_delimiter = ',', value_parser = package_name)]
        packages: Vec<String>,
    },
    /// Make a disk with a system that can be worked in, as an ordinary user
    #[command(subcommand)]
    Build(BuildCommand),
    /// List the guests that there are, and which of them are here
    List,
    /// Remove a guest from the cache folder, or the packages of all guests
    Remove {
        /// Which one
        #[arg(required_unless_present = "packages")]
        name: Option<String>,
        /// Remove what was fetched for --package
        #[arg(long)]
        packages: bool,
    },
}

/// The systems that a disk can be made with.
#[derive(Debug, Subcommand)]
pub enum BuildCommand {
    /// Debian: `ringside run --disk FILE` boots it to a login
    ///
    /// Its packages are fetched through apt and installed inside a guest, by dpkg with all their scripts. It takes a few
    /// minutes. The disk has the essential packages, systemd, apt and some tools; name more with --package. Without
    /// --user and --password the console logs root in.
    Debian(BuildArgs),
}

/// The options of `ringside guest build debian`.
#[derive(Clone, Debug, Args)]
pub struct BuildArgs {
    /// The disk image to make: FILE.qcow2 is a qcow2 image, any other name is a raw one's
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Its format, whatever its name: raw or qcow2
    #[arg(long, value_name = "FORMAT", value_parser = disk_options::format)]
    pub format: Option<disk::Format>,
    /// Install these Debian packages too: python3 or gcc,libc6-dev; may be given more than once
    #[arg(long = "package", value_name = "NAME", value_delimiter = ',', value_parser = package_name)]
    pub packages: Vec<String>,
    /// Bytes of the disk, 1G to 16T; the image takes what is used of it
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = disk_size)]
    pub size: u64,
    /// The machine's name
    #[arg(long, value_name = "NAME", default_value = "debian", value_parser = hostname)]
    pub hostname: String,
    /// Make an ordinary user, who may use sudo
    #[arg(long, value_name = "NAME", value_parser = user_name)]
    pub user: Option<String>,
    /// The password of --user, or of root without --user; other users of this host can see it: see --password-file
    #[arg(long, value_name = "TEXT", value_parser = password, conflicts_with = "password_file")]
    pub password: Option<String>,
    /// Read the password from the first line of this file; `-` is standard input
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// Whether the console logs in by itself [default: on without a password, off with one]
    #[arg(long, value_enum, value_name = "on|off")]
    pub autologin: Option<Switch>,
    /// Replace the file, if there is one
    #[arg(long)]
    pub force: bool,
}

/// Something that is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

/// The guest that is booted where nothing else is asked for.
pub const DEFAULT_GUEST: &str = "debian";

/// The options of `ringside run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Boot this kernel: a bzImage, an ELF file with a PVH or 64-bit entry, or a Multiboot image
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub kernel: Option<PathBuf>,
    /// Give the kernel this initial RAM disk; a Multiboot image has it as its module
    #[arg(long, value_name = "FILE", help_heading = "Guest")]
    pub initrd: Option<PathBuf>,
    /// Give a Multiboot image this file as its next module, with the arguments behind its name: 'FILE ARGUMENTS'
    #[arg(long, value_name = "FILE", requires = "kernel", value_parser = module, help_heading = "Guest")]
    pub module: Vec<ModuleConfig>,
    /// Start this BIOS image instead of a kernel, such as SeaBIOS; its screen and keyboard are the serial port
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "exec", "cmdline", "boot"])]
    #[arg(help_heading = "Guest")]
    pub firmware: Option<PathBuf>,
    /// How long the firmware offers its boot menu, in milliseconds; 0 for not at all
    #[arg(long, value_name = "MS", default_value = "2500", requires = "firmware", help_heading = "Guest")]
    pub boot_menu: u16,
    /// Boot this guest; see `ringside guest list`
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kernel", "firmware"], help_heading = "Guest")]
    #[arg(default_value = DEFAULT_GUEST)]
    #[arg(default_value_ifs = [("kernel", IsPresent, None), ("firmware", IsPresent, None)])]
    pub guest: Option<String>,
    /// The kernel's command line
    ///
    /// With --kernel it is the whole command line; with a named guest it is appended to the guest's own.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, help_heading = "Guest")]
    pub cmdline: Option<String>,
    /// Put Debian packages into the guest, with what they need: python3 or gcc,libc6-dev; may be given more than once
    ///
    /// They are fetched through apt once and kept in the cache folder. Nothing of them is run on the host: their files
    /// are unpacked into the guest's initramfs, without manuals and translations. Recommended packages are not added.
    #[arg(long = "package", value_name = "NAME", value_delimiter = ',', value_parser = package_name)]
    #[arg(conflicts_with_all = ["kernel", "initrd"], help_heading = "Guest")]
    pub packages: Vec<String>,
    /// Run a shell command in the guest instead of a shell; only its output goes to stdout, its status is ours
    #[arg(long, value_name = "COMMAND", conflicts_with = "kernel", allow_hyphen_values = true)]
    #[arg(value_parser = exec_command, help_heading = "Guest")]
    pub exec: Option<String>,
    /// Boot the distribution in this folder of the host: its files are the guest's root file system
    ///
    /// The default guest's kernel mounts it and starts its /sbin/init; with --exec, its /bin/sh runs the command. With
    /// readonly=on the folder stays as it is: what the guest writes is in memory, and gone at the end. The other options
    /// are those of --share.
    #[arg(long, value_name = "DIR[,readonly=on][,as=fs|9p]", value_parser = share_options::root)]
    #[arg(conflicts_with_all = ["kernel", "firmware", "initrd", "packages"], help_heading = "Guest")]
    pub root: Option<ShareConfig>,
    /// How the kernel is entered
    #[arg(long, value_enum, value_name = "HOW", default_value = "auto", help_heading = "Guest")]
    pub boot: Boot,

    /// RAM, in bytes or with K, M, G (binary): 512M, 4G [default: 512M, and more with large packages]
    #[arg(long, short, value_name = "SIZE", value_parser = memory_size, help_heading = "Machine")]
    pub memory: Option<u64>,
    /// Virtual CPUs, 1 to 64; each is a thread
    #[arg(long, short, value_name = "N", default_value = "1", value_parser = cpu_count, help_heading = "Machine")]
    pub cpus: u32,
    /// CPU model, and features to add or remove: host,-avx512f
    #[arg(long, value_name = "MODEL,+F,-F", default_value = "host", help_heading = "Machine")]
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub cpu: String,
    /// What runs the vCPUs
    #[arg(long, value_enum, value_name = "ENGINE", default_value = "auto", help_heading = "Machine")]
    pub engine: Engine,
    /// Whether the software CPU translates hot code, or interprets all of it
    ///
    /// `lockstep` is for finding defects of Ringside: it does both and compares them after each block, many times
    /// slower, on one vCPU without RDRAND and RDSEED. The first difference ends the run with status 247 and is
    /// described on stderr.
    #[arg(long, value_enum, value_name = "on|off|lockstep", default_value = "on", help_heading = "Machine")]
    pub jit: Jit,
    /// A port, such as 0xf4: what the guest writes there ends the run and is its status
    #[arg(long, value_name = "PORT", value_parser = port, help_heading = "Machine")]
    pub debug_exit: Option<u16>,
    /// Add what suites of unit tests expect: ports and memory that keep what is written, and interrupt lines on ports
    ///
    /// Ports 0xe0 to 0xe3 read back what was written; ports 0x2000 to 0x2017 drive the I/O APIC's lines; 64 KiB at
    /// 0xff000000 are memory.
    #[arg(long, help_heading = "Machine")]
    pub testdev: bool,
    /// A disk: FILE or path=FILE, and options behind commas, such as readonly=on; see `ringside disk`
    ///
    /// May be given more than once. It is a virtio block device on the PCI bus. The options:
    /// format=raw|qcow2 (found out where it is not told), readonly=on|off, serial=TEXT (at most 20 bytes),
    /// snapshot=on|off (what is written is forgotten at the end), cache=writeback|direct (whether the host's page cache
    /// is used), iops=N and bps=SIZE (at most so many requests, so many bytes a second). A comma in FILE is written twice.
    /// Where the first disk was made by `ringside guest build`, its system is booted; --exec then runs in that system,
    /// without its services.
    #[arg(long, value_name = "FILE,...", value_parser = disk_options::disk, help_heading = "Machine")]
    pub disk: Vec<DiskConfig>,
    /// A file as persistent memory: FILE or path=FILE, and options behind commas, such as readonly=on
    ///
    /// May be given more than once. The guest reads, writes and executes the file's bytes as memory, at /dev/pmem0 and so
    /// on in Linux (virtio_pmem), with `mount -o dax` without a page cache of its own; what it flushes is durable. The
    /// options: size=SIZE (the file is made, or made larger, to that multiple of 2M), readonly=on|off (what the guest
    /// writes is discarded, and its flushes then fail; mount read-only), snapshot=on|off (what is written is forgotten at
    /// the end). A file of another size than a multiple of 2M is made larger while the machine runs, and gets its size
    /// back at the end if only zeros are there. A comma in FILE is written twice.
    #[arg(long, value_name = "FILE,...", value_parser = disk_options::pmem, help_heading = "Machine")]
    pub pmem: Vec<PmemConfig>,
    /// How virtio devices are reached
    ///
    /// With `mmio` they are in memory, and ACPI tells of them; where the kernel's command line has acpi=off, it is
    /// given virtio_mmio.device= for each instead.
    #[arg(long, value_enum, value_name = "pci|mmio", default_value = "pci", help_heading = "Machine")]
    pub transport: Transport,
    /// Offer virtio drivers less than there is, to find a driver's fault: packed=off,event-idx=off,indirect=off,
    /// in-order=off,notification-data=off
    #[arg(long, value_name = "NAME=on|off", value_delimiter = ',', value_parser = virtio_feature)]
    #[arg(help_heading = "Machine")]
    pub virtio_features: Vec<(u64, bool)>,
    /// Do not boot the system that a disk has: a shell beside it, to repair it
    #[arg(long, conflicts_with_all = ["kernel", "firmware"], help_heading = "Guest")]
    pub rescue: bool,
    /// Share a folder of the host: DIR[,tag=TAG][,readonly=on][,as=fs|9p][,cache=auto|always|none][,ids=mapped|kept];
    /// may be given often
    ///
    /// The default guests mount it at /mnt/TAG; another Linux does with `mount -t virtiofs TAG /mnt`, or for as=9p with
    /// `mount -t 9p -o trans=virtio,version=9p2000.L TAG /mnt`. The tag is `share`, then `share2` …, where none is given.
    /// The guest cannot leave the folder: symbolic links lead where they point in the guest. Its root has the files of
    /// the user that Ringside runs as. Owners, set-user-id bits and devices that it makes are kept in the extended
    /// attribute user.ringside.owner, never on the host's files themselves; where Ringside runs as root, owners are the
    /// host's, and so are access control lists (over 9P with `-o posixacl`); otherwise there are no such lists. Links,
    /// pipes and sockets cannot have that attribute: they are root's whoever makes them, or with ids=kept files on the
    /// host where they are not root's. With cache=auto, changes on the host are seen within a second; cache=always is
    /// for folders that nobody else changes.
    #[arg(long, value_name = "DIR[,tag=TAG,...]", value_parser = share_options::share, help_heading = "Machine")]
    pub share: Vec<ShareConfig>,
    /// Where the guest's terminal is: the first serial port, or a virtio console
    ///
    /// With `virtio` the terminal is hvc0, faster and of the size that it has here, also when that changes. Until the
    /// guest uses it, what it says on its serial port is shown, as a kernel does while it boots. A guest of --kernel
    /// needs console=hvc0 on its command line.
    #[arg(
        long,
        value_enum,
        value_name = "serial|virtio",
        default_value = "serial",
        help_heading = "Machine"
    )]
    #[arg(conflicts_with = "firmware")]
    pub console: Console,
    /// A channel to the guest: name=NAME,path=PATH[,as=file|socket|pty]
    ///
    /// In the guest it is /dev/vport*, and /dev/virtio-ports/NAME where udev runs. What the guest writes goes into the
    /// file at PATH, which is emptied first; with as=socket PATH is a Unix socket that one client at a time talks to;
    /// with as=pty it is a link to a pseudo-terminal. A socket or a link that a killed process has left there is
    /// replaced; one that is in use, or any other file, is an error. May be given more than once.
    #[arg(long, value_name = "name=NAME,path=PATH,...", value_parser = device_options::port, help_heading = "Machine")]
    pub port: Vec<PortConfig>,
    /// A balloon, by which the guest gives memory back: [size=SIZE][,control=SOCKET][,deflate-on-oom=on|off]
    /// [,free-page-reporting=on|off]
    ///
    /// SIZE is what it takes of the guest's memory at first; by default nothing. With control=SOCKET, `ringside balloon
    /// SOCKET SIZE` changes that while the guest runs, and `ringside balloon SOCKET` tells how it is. What the guest does
    /// not use goes back to the host by itself unless free-page-reporting=off; the guest may take the balloon's memory
    /// where it would have to kill a process unless deflate-on-oom=off. A SOCKET that nobody listens on any more is
    /// replaced; one that somebody does, or any other file, is an error.
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "")]
    #[arg(value_parser = device_options::balloon, help_heading = "Machine")]
    pub balloon: Option<BalloonConfig>,
    /// Give the guest random bytes of the host through a virtio entropy device
    #[arg(long, help_heading = "Machine")]
    pub rng: bool,
    /// Sockets between programs of the guest and of the host: cid=N,path=SOCKET
    ///
    /// cid is the guest's address, 3 or more; the host is 2. A program of the host connects to SOCKET, writes
    /// "CONNECT PORT", and reads "OK ..." once the guest has taken it. Where a program of the guest connects to a port of the
    /// host, it gets to the socket SOCKET_PORT. A SOCKET that nobody listens on any more is replaced; one that somebody does, or
    /// any other file, is an error.
    #[arg(long, value_name = "cid=N,path=SOCKET", value_parser = vsock, help_heading = "Machine")]
    pub vsock: Option<VsockConfig>,
    /// Add a file to the firmware configuration device: name=NAME,file=FILE or name=NAME,string=TEXT
    ///
    /// May be given more than once. SeaBIOS reads bootorder, etc/boot-menu-wait, floppyimg/NAME and others.
    #[arg(long, value_name = "NAME,CONTENTS", value_parser = fw_cfg_file, help_heading = "Machine")]
    pub fw_cfg: Vec<FwCfgFile>,
    /// Add a debug console at port 0x402 and append what firmware writes there to this file
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    pub debug_console: Option<PathBuf>,
    /// Start again where the guest asks for a reset or triple-faults, instead of ending
    #[arg(long, help_heading = "Machine")]
    pub reboot: bool,

    /// The exit ledger: `table` on stderr at the end, `json=FILE`, or `off`
    ///
    /// Each VM exit is counted by reason and by device register, with its handling time. May be given more than once.
    /// The default is `table`, and `off` with --exec.
    #[arg(long, value_name = "FORMAT", help_heading = "Reports")]
    pub exits: Vec<ExitsFormat>,
    /// At the end, show time, instructions and memory on stderr
    #[arg(long, help_heading = "Reports")]
    pub stats: bool,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Boot {
    /// The best way that the kernel offers
    Auto,
    /// Unpacked, at its PVH entry
    Pvh,
    /// Unpacked, at its 64-bit entry
    Linux64,
    /// By its own decompressor, as a boot loader does
    Stub,
    /// As a Multiboot image, version 1
    Multiboot,
}

/// What the software CPU does with hot code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Jit {
    /// Translate it
    On,
    /// Interpret it
    Off,
    /// Do both, and compare
    Lockstep,
}

/// Where the guest's terminal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Console {
    /// The first serial port
    Serial,
    /// A virtio console
    Virtio,
}

/// How virtio devices are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// On the PCI bus
    Pci,
    /// In memory
    Mmio,
}

impl From<Transport> for vmm::config::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Pci => Self::Pci,
            Transport::Mmio => Self::Mmio,
        }
    }
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// /dev/kvm where it works, else the software CPU
    Auto,
    /// Ringside's own CPU: runs anywhere
    Soft,
    /// The host's /dev/kvm
    Kvm,
}

/// One value of `--exits`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitsFormat {
    /// Do not count.
    Off,
    /// A table on stderr.
    Table,
    /// JSON in a file.
    Json(PathBuf),
}

impl FromStr for ExitsFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "off" => Ok(Self::Off),
            None if text == "table" => Ok(Self::Table),
            Some(("json", file)) if !file.is_empty() => Ok(Self::Json(file.into())),
            _ if text.starts_with("json") => Err("json needs a file: json=FILE".into()),
            _ => Err("it is `table`, `json=FILE` or `off`".into()),
        }
    }
}

impl RunArgs {
    /// The virtio features that are not to be offered: of each the last word counts.
    pub fn withheld_features(&self) -> u64 {
        self.virtio_features.iter().fold(0, |off, &(bit, on)| if on { off & !bit } else { off | bit })
    }

    /// The `--exits` reports to make.
    ///
    /// # Errors
    /// A message for the user, where `off` stands beside another.
    pub fn exits_reports(&self) -> Result<Vec<ExitsFormat>, String> {
        match self.exits.as_slice() {
            [] if self.exec.is_some() => Ok(Vec::new()),
            [] => Ok(vec![ExitsFormat::Table]),
            [ExitsFormat::Off] => Ok(Vec::new()),
            several if several.contains(&ExitsFormat::Off) => {
                Err("--exits off stands alone: it contradicts the other --exits".into())
            }
            several => Ok(several.to_vec()),
        }
    }
}

fn virtio_feature(text: &str) -> Result<(u64, bool), String> {
    let names = VIRTIO_FEATURES;
    let (name, state) = text.split_once('=').unwrap_or((text, "on"));
    let on = match state {
        "on" => true,
        "off" => false,
        other => return Err(format!("{name} is on or off, not {other:?}")),
    };
    let found = names.iter().find(|(known, _)| *known == name);
    found.map(|&(_, bit)| (bit, on)).ok_or_else(|| {
        format!("{name:?} is no feature that can be left out: {}", names.map(|(name, _)| name).join(", "))
    })
}

fn package_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.');
    match text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("it is not a Debian package's name".into()),
    }
}

fn memory_size(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        0 => Err(format!("a machine without memory cannot run: give at least {}", size::display(MIN_MEMORY))),
        bytes if bytes < MIN_MEMORY => Err(format!(
            "{} are too little: give at least {}",
            size::display(bytes),
            size::display(MIN_MEMORY)
        )),
        bytes if bytes > MAX_MEMORY => {
            Err(format!("{} are too much: the most is {}", size::display(bytes), size::display(MAX_MEMORY)))
        }
        bytes => Ok(bytes),
    }
}

fn cpu_count(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(0) => Err("a machine needs at least 1 vCPU".into()),
        Ok(count) if count > MAX_CPUS => Err(format!("{count} are too many: the most is {MAX_CPUS}")),
        Ok(count) => Ok(count),
        Err(_) => Err(format!("write a number from 1 to {MAX_CPUS}")),
    }
}

fn disk_size(text: &str) -> Result<u64, String> {
    let size = size::parse(text)?;
    match size {
        root_disk::MIN_SIZE..=root_disk::MAX_SIZE if size % (1 << 20) == 0 => Ok(size),
        root_disk::MIN_SIZE..=root_disk::MAX_SIZE => Err("write a multiple of a MiB".into()),
        _ => Err("a disk for a system has 1G to 16T".into()),
    }
}

fn hostname(text: &str) -> Result<String, String> {
    let hint = "a name has 1 to 63 lower-case letters, digits and hyphens";
    if root_disk::is_hostname(text) { Ok(text.to_owned()) } else { Err(hint.into()) }
}

fn user_name(text: &str) -> Result<String, String> {
    let hint = "a user's name begins with a lower-case letter and has at most 32 of them, digits, - and _";
    match text {
        "root" => Err("there is a root anyway: leave --user out".into()),
        _ if root_disk::is_user_name(text) => Ok(text.to_owned()),
        _ => Err(hint.into()),
    }
}

/// A password that one can type: chpasswd(8) reads it as a line.
pub fn password(text: &str) -> Result<String, String> {
    match text {
        "" => Err("the password is empty".into()),
        _ if text.len() > 200 => Err("the password has more than 200 bytes".into()),
        _ if text.contains(char::is_control) => Err("a password has no control characters".into()),
        _ => Ok(text.to_owned()),
    }
}

fn port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "write a port number from 0 to 0xffff".into())
}

fn vsock(text: &str) -> Result<VsockConfig, String> {
    let (mut cid, mut path) = (None, None);
    for option in text.split(',') {
        match option.split_once('=') {
            Some(("cid", value)) => cid = Some(value.parse().ok().filter(|cid| GUEST_CIDS.contains(cid))),
            Some(("path", value)) if !value.is_empty() => path = Some(PathBuf::from(value)),
            _ => return Err(format!("{option:?} is no option of a socket device: cid=N, path=SOCKET")),
        }
    }
    match (cid, path) {
        (Some(None), _) => {
            Err(format!("a guest's address is a number from {} to {}", GUEST_CIDS.start(), GUEST_CIDS.end()))
        }
        (Some(Some(cid)), Some(path)) => Ok(VsockConfig { cid, path }),
        _ => Err("write both: cid=N,path=SOCKET".into()),
    }
}

fn module(text: &str) -> Result<ModuleConfig, String> {
    let (path, arguments) = text.split_once(' ').unwrap_or((text, ""));
    if path.is_empty() {
        return Err("a module begins with its file's name".into());
    }
    Ok(ModuleConfig { path: path.into(), arguments: arguments.to_owned() })
}

fn fw_cfg_file(text: &str) -> Result<FwCfgFile, String> {
    let usage = "write name=NAME,file=FILE or name=NAME,string=TEXT";
    let given = text.strip_prefix("name=").and_then(|rest| rest.split_once(','));
    let (name, contents) = given.ok_or(usage)?;
    let source = match contents.split_once('=') {
        Some(("file", path)) if !path.is_empty() => FwCfgSource::File(path.into()),
        Some(("string", text)) => FwCfgSource::Text(text.to_owned()),
        _ => return Err(usage.into()),
    };
    Ok(FwCfgFile { name: name.to_owned(), source })
}

fn exec_command(text: &str) -> Result<String, String> {
    if text.contains('\0') {
        return Err("a command cannot hold a NUL character".into());
    }
    if text.trim().is_empty() {
        return Err("the command is empty".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> Result<RunArgs, clap::Error> {
        let cli = Cli::read([&["ringside"], line].concat())?;
        Ok(match cli.command {
            Some(Command::Run(run)) => *run,
            _ => cli.run,
        })
    }

    fn refused(line: &[&str]) -> String {
        let error = parse(line).expect_err("must be refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn nothing_at_all_boots_the_default_guest() {
        let run = parse(&[]).unwrap();
        assert_eq!((run.guest.as_deref(), run.memory, run.cpus), (Some(DEFAULT_GUEST), None, 1));
        assert_eq!(run.exits_reports(), Ok(vec![ExitsFormat::Table]));
    }

    #[test]
    fn run_may_be_left_out() {
        for prefix in [&[][..], &["run"]] {
            let run =
                parse(&[prefix, &["--memory", "1G", "--cpus=4", "--exec", "-x; exit 3"]].concat()).unwrap();
            assert_eq!((run.memory, run.cpus, run.exec.as_deref()), (Some(1 << 30), 4, Some("-x; exit 3")));
            assert_eq!(run.exits_reports(), Ok(vec![]));
        }
    }

    #[test]
    fn an_option_before_the_subcommand_is_not_dropped_silently() {
        assert!(refused(&["--debug-exit", "0xf4", "run"]).contains("write --debug-exit after `run`"));
        assert!(refused(&["--cpus", "2", "guest", "list"]).contains("--cpus"));
        let verbose = |line: &[&str]| Cli::read([&["ringside"], line].concat()).unwrap().verbose;
        assert_eq!((verbose(&["-vv", "run"]), verbose(&["run", "-v"]), verbose(&["-v"])), (2, 1, 1));
    }

    #[test]
    fn an_own_kernel_is_no_named_guest() {
        let run = parse(&["run", "--kernel", "vmlinuz", "--cmdline", "-- x"]).unwrap();
        assert_eq!((run.guest, run.cmdline.as_deref()), (None, Some("-- x")));
        assert!(refused(&["--kernel", "k", "--guest", "debian"]).contains("--guest"));
        assert!(refused(&["--kernel", "k", "--exec", "true"]).contains("--exec"));
    }

    #[test]
    fn firmware_stands_instead_of_a_kernel() {
        let run = parse(&["run", "--firmware", "bios.bin", "--boot-menu", "100"]).unwrap();
        assert_eq!((run.guest, run.boot_menu), (None, 100));
        for other in [["--kernel", "k"], ["--exec", "true"], ["--guest", "debian"], ["--boot", "pvh"]] {
            assert!(refused(&[&["--firmware", "f"][..], &other].concat()).contains(other[0]));
        }
        assert!(refused(&["--boot-menu", "100"]).contains("--firmware"));
    }

    #[test]
    fn a_socket_device_has_an_address_and_a_path() {
        let run = parse(&["--vsock", "cid=3,path=/tmp/vm"]).unwrap();
        assert_eq!(run.vsock, Some(VsockConfig { cid: 3, path: "/tmp/vm".into() }));
        for (bad, why) in [
            ("cid=3", "write both"),
            ("path=a", "write both"),
            ("cid=2,path=a", "number from 3"),
            ("cid=4294967295,path=a", "number from 3"),
            ("cid=x,path=a", "number from 3"),
            ("cid=3,path=", "no option"),
            ("cid=3,path=a,uds=b", "no option"),
        ] {
            assert!(refused(&["--vsock", bad]).contains(why), "{bad}");
        }
    }

    #[test]
    fn modules_have_a_file_and_arguments() {
        let run = parse(&["--kernel", "k", "--module", "a b c", "--module", "d"]).unwrap();
        let module =
            |path: &str, arguments: &str| ModuleConfig { path: path.into(), arguments: arguments.into() };
        assert_eq!(run.module, [module("a", "b c"), module("d", "")]);
        assert!(refused(&["--module", "a"]).contains("--kernel"));
        assert!(refused(&["--kernel", "k", "--module", " x"]).contains("file's name"));
    }

    #[test]
    fn files_for_fw_cfg_have_a_name_and_contents() {
        let run = parse(&["--fw-cfg", "name=opt/a,string=b,c=d", "--fw-cfg", "name=x,file=a,b"]).unwrap();
        let file = |name: &str, source| FwCfgFile { name: name.into(), source };
        let expected =
            [file("opt/a", FwCfgSource::Text("b,c=d".into())), file("x", FwCfgSource::File("a,b".into()))];
        assert_eq!(run.fw_cfg, expected);
        for bad in ["", "opt/a", "name=a", "name=a,file=", "name=a,value=1", "file=a,name=b"] {
            assert!(refused(&["--fw-cfg", bad]).contains("name=NAME"), "{bad}");
        }
    }

    #[test]
    fn bad_values_are_refused_by_name_before_anything_is_built() {
        for (option, value, why) in [
            ("--memory", "0", "without memory"),
            ("--memory", "1K", "at least 16 MiB"),
            ("--memory", "900T", "the most is"),
            ("--memory", "lots", "not a size"),
            ("--cpus", "0", "at least 1"),
            ("--cpus", "300", "the most is 64"),
            ("--cpus", "-1", ""),
            ("--cpus", "two", "a number from 1 to 64"),
            ("--debug-exit", "0x10000", "port number"),
            ("--debug-exit", "f4", "port number"),
            ("--exits", "json", "json=FILE"),
            ("--exits", "xml", "`table`"),
            ("--engine", "tcg", "possible values"),
            ("--boot", "bios", "possible values"),
            ("--exec", " ", "empty"),
            ("--package", "Not a name", "not a Debian package's name"),
        ] {
            let message = refused(&[&format!("{option}={value}")]);
            assert!(message.contains(option) && message.contains(why), "{message}");
            assert!(message.contains(&format!("'{value}'")), "{message}");
        }
    }

    #[test]
    fn a_disk_to_build_has_an_output_and_sane_values() {
        let build = |line: &[&str]| {
            let line = [&["ringside", "guest", "build", "debian"], line].concat();
            match Cli::read(line).map(|cli| cli.command) {
                Ok(Some(Command::Guest(GuestCommand::Build(BuildCommand::Debian(args))))) => Ok(args),
                Ok(_) => panic!("another command"),
                Err(error) => Err(error.to_string()),
            }
        };
        let args = build(&["-o", "d.qcow2", "--package", "gcc,python3", "--size", "8G"]).unwrap();
        assert_eq!((args.size, args.packages.len(), args.hostname.as_str()), (8 << 30, 2, "debian"));
        for (bad, why) in [
            (&[][..], "--output"),
            (&["-o", "d", "--size", "100M"], "1G to 16T"),
            (&["-o", "d", "--size", "1073741825"], "multiple of a MiB"),
            (&["-o", "d", "--hostname", "a b"], "--hostname"),
            (&["-o", "d", "--user", "root"], "root anyway"),
            (&["-o", "d", "--user", "A"], "lower-case"),
            (&["-o", "d", "--password", ""], "empty"),
            (&["-o", "d", "--password", "a", "--password-file", "b"], "cannot be used with"),
        ] {
            let refused = build(bad).unwrap_err();
            assert!(refused.contains(why), "{bad:?}: {refused}");
        }
    }

    #[test]
    fn ports_are_hexadecimal_or_decimal() {
        assert_eq!(parse(&["--debug-exit", "0xf4"]).unwrap().debug_exit, Some(0xf4));
        assert_eq!(parse(&["--debug-exit", "244"]).unwrap().debug_exit, Some(0xf4));
    }

    #[test]
    fn packages_add_up_and_need_a_guest_of_the_catalog() {
        let run = parse(&["--package", "gcc,libc6-dev", "--package=python3"]).unwrap();
        assert_eq!(run.packages, ["gcc", "libc6-dev", "python3"]);
        assert!(refused(&["--package", "gcc", "--kernel", "k"]).contains("--package"));
        assert!(refused(&["--package", "gcc", "--initrd", "i"]).contains("--initrd"));
        assert!(refused(&["--package", "gcc,"]).contains("--package"));
    }

    #[test]
    fn reports_add_up_but_off_stands_alone() {
        let run = parse(&["--exits", "table", "--exits", "json=a=b"]).unwrap();
        assert_eq!(run.exits_reports(), Ok(vec![ExitsFormat::Table, ExitsFormat::Json("a=b".into())]));
        assert!(parse(&["--exits=off", "--exits=table"]).unwrap().exits_reports().is_err());
    }

    #[test]
    fn the_long_help_has_examples_and_the_exit_statuses() {
        let help = Cli::command().render_long_help().to_string();
        assert!(
            help.contains("Exit status:") && help.contains("Ctrl-A x") && help.contains("triple-faulted")
        );
    }

    #[test]
    fn virtio_features_are_left_out_by_name_and_the_last_word_counts() {
        let off = |text: &str| parse(&["run", "--virtio-features", text]).unwrap().withheld_features();
        assert_eq!(off("packed=off,event-idx=off"), 1 << 34 | 1 << 29);
        assert_eq!(off("packed=off,packed=on,indirect"), 0);
        assert!(refused(&["--virtio-features", "version-1=off"]).contains("packed, event-idx"));
        assert!(refused(&["--virtio-features", "packed=no"]).contains("on or off"));
        assert!(refused(&["--transport", "isa"]).contains("mmio"));
    }
}
