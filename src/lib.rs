//! What the `ringside` command shares with the whole-machine tests: the default guests.

pub mod guest;
