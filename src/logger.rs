//! Diagnostics on stderr.

use log::{LevelFilter, Log, Metadata, Record};

use crate::terminal;

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            terminal::say(&format!("ringside: {level}: {}\n", record.args()));
        }
    }

    fn flush(&self) {}
}

/// Starts logging: warnings, and with each `-v` one level more.
pub fn start(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    // It fails only where a logger has been set before.
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(level);
    }
}
