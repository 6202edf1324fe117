mod bad_input;
mod entry;
mod synthetic;
mod unpacking;
