//! A disk that fills up.

use std::process::Command;

use crate::world::{DUMP, LEARN, Outcome, World};

/// `DUMP` into a folder of its own.
fn dump() -> String {
    DUMP.replace("--out dump", "--out full/dump")
}

#[test]
#[cfg(unix)]
fn a_file_that_may_not_grow() {
    let world = World::new();
    let before = world.files();
    let leank = env!("CARGO_BIN_EXE_leank");
    // Ignored, the signal becomes an error of the write.
    let script = format!("trap '' XFSZ; ulimit -f 8; exec {leank} {}", dump());
    let mut command = Command::new("sh");
    command.args(["-c", &script]).current_dir(world.path("."));
    std::fs::create_dir(world.path("full")).unwrap();
    let words = ["full", "layer-", "too large", "ulimit -f"];
    Outcome::new(command.output().unwrap()).assert_failed(&words);
    std::fs::remove_dir(world.path("full")).expect("something was left");
    assert_eq!(world.files(), before);
}

/// Runs `leank` with `full` a file system of `size`, `filled` bytes of it taken; `None` where none
/// can be mounted. What is on it afterwards goes to `left.txt`.
#[cfg(target_os = "linux")]
fn on_a_small_disk(world: &World, (size, filled): (&str, u32), arguments: &str) -> Option<Outcome> {
    let leank = env!("CARGO_BIN_EXE_leank");
    std::fs::create_dir_all(world.path("full")).unwrap();
    let script = format!(
        "mount -t tmpfs -o size={size} none full || exit 77
         head -c {filled} /dev/zero > full/taken
         {leank} {arguments}
         code=$?
         ls -A full > left.txt
         exit $code"
    );
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    let output = command.current_dir(world.path(".")).output();
    let outcome = output
        .map(Outcome::new)
        .ok()
        .filter(|outcome| outcome.code != Some(77) && !outcome.stderr.starts_with("unshare"));
    if outcome.is_none() {
        eprintln!("SKIPPED: no small file system can be mounted here");
    }
    outcome
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_while_dumping() {
    let world = World::new();
    let Some(outcome) = on_a_small_disk(&world, ("64k", 1), &dump()) else { return };
    outcome.assert_failed(&["full", "no space left", "bytes", "free that much"]);
    assert_eq!(world.read("left.txt"), b"taken\n");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_while_writing_a_mask() {
    let world = World::with_mask();
    let learn = format!("{LEARN} --k-ratio 0.5 --out full/mask.safetensors");
    for arguments in [&learn, "convert mask.safetensors full/mask.npy"] {
        let Some(outcome) = on_a_small_disk(&world, ("8k", 8192), arguments) else { return };
        outcome.assert_failed(&["full/mask", "No space left"]);
        assert_eq!(world.read("left.txt"), b"taken\n");
    }
}
