mod bad_input;
mod entry;
mod multiboot;
mod synthetic;
mod unpacking;
