//! How a fetch tells what it does: on stderr alone, as a bar on a terminal and as plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Told of a fetch's steps.
pub trait Progress {
    /// Something worth a line.
    fn note(&mut self, text: &str);
    /// A step begins; `bytes` of it are known or not.
    fn begin(&mut self, what: &str, bytes: Option<u64>);
    /// So many bytes of the step are done, counted from its begin.
    fn advance(&mut self, bytes: u64);
    /// The step is over.
    fn end(&mut self);
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn note(&mut self, _: &str) {}
    fn begin(&mut self, _: &str, _: Option<u64>) {}
    fn advance(&mut self, _: u64) {}
    fn end(&mut self) {}
}

/// A bar where stderr is a terminal, lines on stderr where it is not.
pub fn to_stderr() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() { Box::new(Bar { bar: None }) } else { Box::new(Lines) }
}

/// Plain lines: one for each step.
struct Lines;

impl Progress for Lines {
    fn note(&mut self, text: &str) {
        eprintln!("ringside: {text}");
    }
    fn begin(&mut self, what: &str, bytes: Option<u64>) {
        match bytes {
            Some(bytes) => eprintln!("ringside: {what} ({} MiB)", bytes.div_ceil(1 << 20)),
            None => eprintln!("ringside: {what}"),
        }
    }
    fn advance(&mut self, _: u64) {}
    fn end(&mut self) {}
}

struct Bar {
    bar: Option<ProgressBar>,
}

impl Progress for Bar {
    fn note(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn begin(&mut self, what: &str, bytes: Option<u64>) {
        self.end();
        let (bar, template) = match bytes {
            Some(bytes) => {
                (ProgressBar::new(bytes), "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            }
            None => (ProgressBar::new_spinner(), "{spinner} {msg}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        self.bar = Some(bar);
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}
