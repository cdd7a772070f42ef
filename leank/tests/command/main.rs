//! The `leank` command, run as a user runs it, on a tiny random model that the tests write.

#[cfg(target_os = "linux")]
mod attacks;
mod bad_input;
mod bad_model;
mod demo;
mod disk;
mod faults;
mod formats;
mod killed;
mod messages;
mod model;
mod reliable;
mod report;
mod usage;
mod whole_way;
mod world;
