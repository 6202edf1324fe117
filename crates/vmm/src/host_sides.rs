//! The virtio devices that have a side on the host while the machine runs: the console with its ports, the balloon.

use std::io;
use std::thread::JoinHandle;

use virtio::balloon::{Balloon, BalloonControl};
use virtio::console::{Console, ConsoleHandle, MAX_PORTS, PortHandle, PortKind};

use crate::balloon_socket;
use crate::config::{ConfigError, MachineConfig};
use crate::console_ports::{self, Backend, TerminalPort};
use crate::error::BuildError;
use crate::machine::SerialLine;
use crate::outcome::Ending;
use crate::output::{Output, OutputThread};
use crate::unix_socket::Listener;

/// What was opened for them, before anything runs.
#[derive(Default)]
pub struct HostSides {
    console: Option<ConsoleHandle>,
    /// Where the terminal leads.
    line: Option<SerialLine>,
    terminal: Option<PortHandle>,
    ports: Vec<(String, PortHandle, Backend)>,
    balloon: Option<BalloonControl>,
    socket: Option<Listener>,
}

/// Their threads.
pub struct Working {
    console: Option<ConsoleHandle>,
    threads: Vec<JoinHandle<()>>,
    output: Option<OutputThread>,
}

impl HostSides {
    /// Makes the devices and opens what they lead to.
    ///
    /// # Errors
    /// [`BuildError`] for what cannot be opened.
    pub fn open(
        config: &MachineConfig,
        devices: &mut Vec<Box<dyn virtio::Device>>,
    ) -> Result<Self, BuildError> {
        let mut sides = Self::default();
        if config.console.is_some() || !config.ports.is_empty() {
            sides.open_console(config, devices)?;
        }
        if let Some(balloon) = &config.balloon {
            let (device, control) = Balloon::new(balloon.options);
            devices.push(Box::new(device));
            sides.balloon = Some(control);
            sides.socket = balloon.control.as_deref().map(Listener::bind).transpose()?;
        }
        Ok(sides)
    }

    fn open_console(
        &mut self,
        config: &MachineConfig,
        devices: &mut Vec<Box<dyn virtio::Device>>,
    ) -> Result<(), BuildError> {
        let mut kinds: Vec<_> = config.console.iter().map(|_| PortKind::Console).collect();
        let first = kinds.len();
        kinds.extend(config.ports.iter().map(|port| PortKind::Channel(port.name.clone())));
        if kinds.len() > MAX_PORTS {
            return Err(ConfigError::Ports(kinds.len()).into());
        }
        let (device, handle) = Console::new(kinds, config.console.unwrap_or_default());
        devices.push(Box::new(device));
        self.terminal = config.console.and_then(|_| handle.port(0));
        for (index, port) in (first..).zip(&config.ports) {
            let Some(end) = handle.port(index) else { continue };
            self.ports.push((port.name.clone(), end, Backend::open(port)?));
        }
        self.console = Some(handle);
        Ok(())
    }

    /// Says where the terminal leads.
    pub fn connect(&mut self, line: SerialLine) {
        self.line = Some(line);
    }

    /// The terminal, whose size may change.
    pub fn console(&self) -> Option<ConsoleHandle> {
        self.terminal.as_ref().and(self.console.clone())
    }

    /// Starts the threads that move the bytes.
    ///
    /// # Errors
    /// The host's, where it gives none.
    pub fn start(self, ending: &Ending) -> io::Result<Working> {
        let mut working = Working { console: self.console, threads: Vec::new(), output: None };
        if let (Some(port), Some(line)) = (self.terminal, self.line) {
            let (output, thread) = Output::start(line.output, ending)?;
            working.output = Some(thread);
            working.threads.push(console_ports::pass_on(port.clone(), output, ending)?);
            if let Some(input) = line.input {
                working.threads.push(input.feed(Box::new(TerminalPort(port)), ending)?);
            }
        }
        for (name, port, backend) in self.ports {
            working.threads.push(backend.start(&name, port, ending)?);
        }
        if let (Some(control), Some(socket)) = (self.balloon, self.socket) {
            working.threads.push(balloon_socket::start(socket, control, ending)?);
        }
        Ok(working)
    }
}

impl Working {
    /// The run has ended: what the guest has sent is passed on, and the threads end.
    pub fn finish(self, stopped: bool) {
        if let Some(console) = &self.console {
            console.close();
        }
        for thread in self.threads {
            // They only move bytes; were one to fail, the run has ended all the same.
            let _ = thread.join();
        }
        if let Some(output) = self.output {
            output.finish(stopped);
        }
    }
}
