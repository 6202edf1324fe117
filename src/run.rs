//! `ringside run`: from the command line to the exit status.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use ringside::guest::{self, GuestFiles};
use vmm::boot::Protocol;
use vmm::config::{self, BootConfig, FirmwareConfig, ShareConfig};
use vmm::input::Input;
use vmm::machine::SerialLine;
use vmm::{EngineChoice, Machine, MachineConfig, Outcome, StopReason, Summary, Translation};

use crate::cli::{Boot, Console, DEFAULT_GUEST, Engine, ExitsFormat, Jit, RunArgs};
use crate::console::{self, Present};
use crate::root_disk::{self, HeldInput};
use crate::terminal::{self, RawMode};
use crate::{exit_status, share_options, stats};

/// The port that the default guests report a command's status at.
const EXEC_STATUS_PORT: u16 = 0xf4;

/// Runs a guest as `args` say; gives the process's exit status. `started` is when the process began.
///
/// # Errors
/// What keeps the machine from being built or its reports from being written.
pub fn run(args: &RunArgs, started: Instant) -> anyhow::Result<u8> {
    let reports = args.exits_reports().map_err(anyhow::Error::msg)?;
    let json = reports.iter().find_map(json_file).map(create).transpose()?;
    let present = Present::default();
    console::follow_signals(&present).context("cannot handle signals")?;
    let config = configure(args, !reports.is_empty())?;
    present.begin();
    let terminal = args.exec.is_none() && io::stdin().is_terminal();
    // Firmware and boot loaders poll the port, and never say that they have opened it.
    let at_once = terminal || args.firmware.is_some();
    let input = if at_once { Input::interactive() } else { Input::patient() };
    let mut held = None;
    if args.exec.is_none() && !terminal && root_disk::asks_for_login(args)? {
        let (present, input) = (present.clone(), input.clone());
        held = Some(HeldInput::new(move || console::follow_stdin(&present, &input, false)));
    } else if args.exec.is_none() {
        console::follow_stdin(&present, &input, terminal).context("cannot read standard input")?;
    }
    let summary = loop {
        let console = (args.console == Console::Virtio).then(|| console_line(args, &input, held.take()));
        let mut machine =
            Machine::build(&config, lines(args, &input, held.take()))?.counting_memory(args.stats);
        if let Some(console) = console {
            machine = machine.with_console(console);
        }
        present.set(machine.controls());
        let raw =
            if terminal { RawMode::enter(io::stdin()).context("cannot set up the terminal")? } else { None };
        let summary = machine.run()?;
        // What it has open is to be closed before the next one opens it.
        present.forget();
        drop(raw);
        if !(args.reboot && summary.outcome.is_reset()) {
            break summary;
        }
        log::info!("{}; starting again", summary.outcome);
    };
    tell(&summary, args, terminal);
    report_exits(&summary, &reports, json)?;
    if args.stats {
        terminal::say(&stats::table(&summary, started));
    }
    Ok(exit_status::of(&summary.outcome, args.exec.is_some()))
}

/// RAM where nothing else is asked for, in bytes.
const DEFAULT_MEMORY: u64 = 512 << 20;

/// The same for a system of its own, on a disk or in a folder.
const ROOT_MEMORY: u64 = 1 << 30;

/// The plain data that the machine is made from.
fn configure(args: &RunArgs, ledger: bool) -> anyhow::Result<MachineConfig> {
    let named = args.guest.as_deref().unwrap_or(DEFAULT_GUEST);
    root_disk::check_folder(args)?;
    let logs_in = root_disk::asks_for_login(args)?;
    let mut packages = 0;
    let boot = match (&args.firmware, &args.kernel) {
        (Some(image), _) => config::Boot::Firmware(FirmwareConfig {
            image: image.clone(),
            boot_menu: Duration::from_millis(args.boot_menu.into()),
        }),
        (None, Some(kernel)) => config::Boot::Kernel(BootConfig {
            kernel: kernel.clone(),
            initrd: args.initrd.clone(),
            modules: args.module.clone(),
            overlay: Vec::new(),
            cmdline: args.cmdline.clone().unwrap_or_default(),
            protocol: protocol(args.boot),
        }),
        (None, None) => config::Boot::Kernel(named_guest(args, with_packages(args, named, &mut packages)?)?),
    };
    let config = MachineConfig {
        memory: args.memory.unwrap_or_else(|| if logs_in { ROOT_MEMORY } else { memory_with(packages) }),
        cpus: args.cpus,
        cpu: cpu_model(args),
        engine: match args.engine {
            // It is the software CPU that is compared.
            Engine::Auto if args.jit == Jit::Lockstep => EngineChoice::Soft,
            Engine::Auto => EngineChoice::Auto,
            Engine::Soft => EngineChoice::Soft,
            Engine::Kvm => EngineChoice::Kvm,
        },
        jit: translation(args.jit),
        boot,
        transport: args.transport.into(),
        virtio_withheld: args.withheld_features(),
        disks: args.disk.clone(),
        pmem: args.pmem.clone(),
        shares: share_options::with_tags(args.root.as_ref(), &args.share),
        rng: args.rng,
        console: (args.console == Console::Virtio).then(terminal::size),
        ports: args.port.clone(),
        balloon: args.balloon.clone(),
        vsock: args.vsock.clone(),
        fw_cfg: args.fw_cfg.clone(),
        debug_console: args.debug_console.clone(),
        debug_exit: args.debug_exit.or(args.exec.is_some().then_some(EXEC_STATUS_PORT)),
        testdev: args.testdev,
        ledger,
    };
    config.check()?;
    Ok(config)
}

fn translation(jit: Jit) -> Translation {
    match jit {
        Jit::On => Translation::On,
        Jit::Off => Translation::Off,
        Jit::Lockstep => Translation::Lockstep,
    }
}

/// Two runs of a guest cannot be compared where each gets random numbers of its own.
fn cpu_model(args: &RunArgs) -> String {
    match args.jit {
        Jit::Lockstep => format!("{},-rdrand,-rdseed", args.cpu),
        Jit::On | Jit::Off => args.cpu.clone(),
    }
}

fn protocol(boot: Boot) -> Protocol {
    match boot {
        Boot::Auto => Protocol::Auto,
        Boot::Pvh => Protocol::Pvh,
        Boot::Linux64 => Protocol::Linux64,
        Boot::Stub => Protocol::Stub,
        Boot::Multiboot => Protocol::Multiboot,
    }
}

fn find_guest(name: &str) -> anyhow::Result<GuestFiles> {
    if let Some(files) = guest::locate(name) {
        return Ok(files);
    }
    Ok(guest::fetch(name, &mut *guest::to_stderr())?)
}

/// The guest, with the packages that are asked for in its initramfs; `bytes` becomes what they take.
fn with_packages(args: &RunArgs, name: &str, bytes: &mut u64) -> anyhow::Result<GuestFiles> {
    let mut files = find_guest(name)?;
    if !args.packages.is_empty() {
        let progress = &mut *guest::to_stderr();
        let software = guest::software::with_packages(name, &files, &args.packages, progress)?;
        (files.initrd, *bytes) = (software.initrd, software.bytes);
    }
    Ok(files)
}

/// The RAM of a guest with so many bytes of packages. While the kernel unpacks them they are there twice, and it lets its
/// first file system have half of the RAM.
fn memory_with(packages: u64) -> u64 {
    DEFAULT_MEMORY + (3 * packages).next_multiple_of(64 << 20)
}

fn named_guest(args: &RunArgs, files: GuestFiles) -> anyhow::Result<BootConfig> {
    let mut cmdline = files.cmdline;
    if let Some(word) = root_disk::arguments(args)? {
        cmdline = format!("{cmdline} {word}");
    }
    if args.console == Console::Virtio {
        // The last one that is named is the terminal.
        cmdline.push_str(" console=hvc0");
    }
    if args.exec.is_none() && terminal::has_size() {
        let kind = std::env::var("TERM").unwrap_or_default();
        let (columns, rows) = terminal::size();
        let more = guest::terminal_arguments(&kind, columns, rows);
        cmdline = format!("{cmdline} {more}");
    }
    if let Some(more) = &args.cmdline {
        cmdline = format!("{cmdline} {more}");
    }
    Ok(BootConfig {
        // The stub is the packed kernel's.
        kernel: if args.boot == Boot::Stub { files.bzimage } else { files.kernel },
        initrd: Some(args.initrd.clone().unwrap_or(files.initrd)),
        modules: Vec::new(),
        overlay: overlay(args),
        cmdline,
        protocol: protocol(args.boot),
    })
}

/// What is appended to the guest's initramfs: the command, and which folders it is to mount.
fn overlay(args: &RunArgs) -> Vec<u8> {
    let mut overlay = args.exec.as_deref().map(guest::initramfs::exec_overlay).unwrap_or_default();
    let shares = share_options::with_tags(args.root.as_ref(), &args.share);
    if !shares.is_empty() {
        let line = |share: &ShareConfig| format!("{} {}\n", share.tag, share_options::mount(share));
        let (root, others) = shares.split_at(usize::from(args.root.is_some()));
        let others: String = others.iter().map(line).collect();
        overlay.extend(guest::initramfs::shares_overlay(root.first().map(line).as_deref(), &others));
    }
    overlay
}

/// Shows what the guest says on its serial port until it says something on its console.
struct UntilConsole(io::Stdout);

/// Whether the virtio console has said something.
static CONSOLE_USED: AtomicBool = AtomicBool::new(false);

impl Write for UntilConsole {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if CONSOLE_USED.load(Ordering::SeqCst) { Ok(data.len()) } else { self.0.write(data) }
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The virtio console's output.
struct ConsoleOutput(Box<dyn Write + Send>);

impl Write for ConsoleOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        CONSOLE_USED.store(true, Ordering::SeqCst);
        self.0.write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Where the virtio console leads: to this terminal, but for a command, whose output is all that is shown.
fn console_line(args: &RunArgs, input: &Input, held: Option<HeldInput>) -> SerialLine {
    CONSOLE_USED.store(false, Ordering::SeqCst);
    let (output, input): (Box<dyn Write + Send>, _) = match (&args.exec, held) {
        (None, Some(held)) => (Box::new(held.until_login(io::stdout())), Some(input.clone())),
        (None, None) => (Box::new(io::stdout()), Some(input.clone())),
        (Some(_), _) if log::log_enabled!(log::Level::Info) => (Box::new(io::stderr()), None),
        (Some(_), _) => (Box::new(io::sink()), None),
    };
    SerialLine { output: Box::new(ConsoleOutput(output)), input }
}

/// Where the serial ports lead: the console to this terminal, or with `--exec` the command's lines to ours.
fn lines(args: &RunArgs, input: &Input, held: Option<HeldInput>) -> Vec<SerialLine> {
    let nowhere = || SerialLine { output: Box::new(io::sink()), input: None };
    if args.exec.is_none() && args.console == Console::Virtio {
        return vec![SerialLine { output: Box::new(UntilConsole(io::stdout())), input: None }, nowhere()];
    }
    if args.exec.is_none() {
        let output: Box<dyn Write + Send> = match held {
            Some(held) => Box::new(held.until_login(io::stdout())),
            None => Box::new(io::stdout()),
        };
        return vec![SerialLine { output, input: Some(input.clone()) }, nowhere()];
    }
    let console: Box<dyn Write + Send> =
        if log::log_enabled!(log::Level::Info) { Box::new(io::stderr()) } else { Box::new(io::sink()) };
    vec![
        SerialLine { output: console, input: None },
        SerialLine { output: Box::new(io::stdout()), input: None },
        SerialLine { output: Box::new(io::stderr()), input: None },
    ]
}

/// Says how the run ended, where that is not what one expects.
fn tell(summary: &Summary, args: &RunArgs, terminal: bool) {
    // The guest may have left the cursor within a line.
    let begin = if terminal { "\n" } else { "" };
    match &summary.outcome {
        Outcome::PowerOff if args.exec.is_none() => {}
        Outcome::PowerOff => {
            terminal::say("ringside: the guest ended before the command's status was known\n")
        }
        Outcome::DebugExit(value) if args.exec.is_some() && *value <= 0xff => {}
        Outcome::Stopped(StopReason::OutputClosed) => {}
        outcome => terminal::say(&format!("{begin}ringside: {outcome}\n")),
    }
}

fn json_file(format: &ExitsFormat) -> Option<&Path> {
    match format {
        ExitsFormat::Json(path) => Some(path),
        _ => None,
    }
}

/// Opens a report's file before the run, so that a run of an hour does not end with a name that cannot be written.
fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("cannot write the exits to {}", path.display()))
}

fn report_exits(summary: &Summary, reports: &[ExitsFormat], json: Option<File>) -> anyhow::Result<()> {
    let Some(exits) = &summary.exits else { return Ok(()) };
    if reports.contains(&ExitsFormat::Table) {
        terminal::say(&format!("\n{}", exits.table()));
    }
    if let Some(mut file) = json {
        let text = exits.to_json()?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.flush())
            .context("cannot write the exits as JSON")?;
    }
    Ok(())
}
