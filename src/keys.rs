//! The keys that are Ringside's own: Ctrl-A and a letter.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// What Ctrl-A h shows.
pub const HELP: &str = "\
Ctrl-A x   end the run
Ctrl-A p   press the power button
Ctrl-A e   show the exits so far
Ctrl-A a   send Ctrl-A to the guest
Ctrl-A h   this list
";

/// What the user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give these bytes to the guest.
    Send(Vec<u8>),
    /// End the run.
    Quit,
    /// Press the machine's power button.
    PowerButton,
    /// Show the exit ledger as it stands.
    Exits,
    /// List the keys.
    Help,
}

/// Tells Ringside's keys from the guest's in a stream of bytes.
#[derive(Debug, Default)]
pub struct Keys {
    after_prefix: bool,
}

impl Keys {
    /// What these bytes ask for, in their order. A prefix at their end is kept for the next call.
    pub fn read(&mut self, bytes: &[u8]) -> Vec<Action> {
        let mut actions = Vec::new();
        for &byte in bytes {
            match (std::mem::take(&mut self.after_prefix), byte) {
                (false, PREFIX) => self.after_prefix = true,
                (false, byte) | (true, byte @ PREFIX) => send(&mut actions, &[byte]),
                (true, b'a' | b'A') => send(&mut actions, &[PREFIX]),
                (true, b'x' | b'X') => actions.push(Action::Quit),
                (true, b'p' | b'P') => actions.push(Action::PowerButton),
                (true, b'e' | b'E') => actions.push(Action::Exits),
                (true, b'h' | b'H' | b'?') => actions.push(Action::Help),
                // Not ours: the guest gets both.
                (true, other) => send(&mut actions, &[PREFIX, other]),
            }
        }
        actions
    }
}

fn send(actions: &mut Vec<Action>, bytes: &[u8]) {
    match actions.last_mut() {
        Some(Action::Send(before)) => before.extend_from_slice(bytes),
        _ => actions.push(Action::Send(bytes.to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Vec<Action> {
        Keys::default().read(bytes)
    }

    #[test]
    fn what_is_typed_goes_to_the_guest() {
        assert_eq!(read(b"ls\r\x03\x04"), [Action::Send(b"ls\r\x03\x04".to_vec())]);
    }

    #[test]
    fn the_prefix_makes_the_next_key_ours() {
        let expected = [Action::Send(b"q".to_vec()), Action::Help, Action::Send(b"r".to_vec()), Action::Quit];
        assert_eq!(read(b"q\x01hr\x01x"), expected);
        assert_eq!(read(b"\x01p\x01e"), [Action::PowerButton, Action::Exits]);
    }

    #[test]
    fn the_prefix_itself_can_be_sent() {
        assert_eq!(read(b"\x01a"), [Action::Send(vec![1])]);
        assert_eq!(read(b"\x01\x01"), [Action::Send(vec![1])]);
        assert_eq!(read(b"\x01k"), [Action::Send(vec![1, b'k'])]);
    }

    #[test]
    fn the_prefix_may_end_one_read_and_the_key_begin_the_next() {
        let mut keys = Keys::default();
        assert_eq!(keys.read(b"\x01"), []);
        assert_eq!(keys.read(b"x"), [Action::Quit]);
    }
}
