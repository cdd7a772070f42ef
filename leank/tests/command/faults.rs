//! Writes that fail, at every command that writes: what is there afterwards is the old file or the new one.
//! `tools/faults.py` does the same at every system call, and kills at random moments.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use crate::world::{DUMP, LEARN, Outcome, World, visit};

/// Runs `leank` in a shell after `setting`, with its streams where `redirected` says.
fn in_a_shell(world: &World, setting: &str, arguments: &str, redirected: &str) -> Outcome {
    let leank = env!("CARGO_BIN_EXE_leank");
    let script = format!("{setting}; exec {leank} {arguments} {redirected}");
    let mut command = Command::new("sh");
    Outcome::new(command.args(["-c", &script]).current_dir(world.path(".")).output().unwrap())
}

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Every file in the folders, but for a journal in a finished dump, which does no harm.
fn files(world: &World) -> Files {
    let mut files = Files::new();
    visit(&world.path("."), &mut |path, metadata| {
        if metadata.is_file() && path != world.path("./dump/written.txt") {
            files.insert(path.to_owned(), fs::read(path).unwrap());
        }
    });
    files
}

fn put_back(world: &World, old: &Files) {
    for path in files(world).keys().filter(|path| !old.contains_key(*path)) {
        fs::remove_file(path).unwrap();
    }
    for (path, bytes) in old {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if fs::read(path).ok().as_ref() != Some(bytes) {
            fs::write(path, bytes).unwrap();
        }
    }
}

/// Short writes, then errors; and a process that the system ends amid a write. Every file is the old or
/// the new one, and dumps and splits, which are several, all of them; the next run ends as if nothing had
/// been.
#[test]
#[cfg(unix)]
fn files_that_may_not_grow() {
    let world = World::with_mask();
    world.done("shard mask.safetensors --world 2 --out split");
    world.done(&format!("{LEARN} --k-ratio 0.25 --out other.safetensors --pareto front"));
    let again = format!("{DUMP} --seed 1 --overwrite");
    let learn =
        format!("{LEARN} --bytes 0.5 --formats k16,k8,v16 --out other.safetensors --pareto front");
    for (command, together) in [
        (again.as_str(), "dump/"),
        (learn.as_str(), ""),
        ("shard other.safetensors --world 1 --out split", "split/"),
        ("convert other.safetensors mask.npy", ""),
        ("report --mask mask.safetensors --out page.html --figures figures", ""),
    ] {
        let old = files(&world);
        world.done(command);
        let new = files(&world);
        let changed = |(path, bytes): &(&PathBuf, &Vec<u8>)| old.get(*path) != Some(*bytes);
        let largest = new.iter().filter(changed).map(|(_, bytes)| bytes.len()).max().unwrap();
        // In units of 512 bytes. Ignored, the signal becomes an error of the write.
        let blocks = largest / 512;
        let limits = (0..6).map(|sixth| blocks * sixth / 6);
        for (limit, ignored) in limits.flat_map(|limit| [(limit, true), (limit, false)]) {
            put_back(&world, &old);
            let ignore = if ignored { "trap '' XFSZ; " } else { "" };
            let outcome = in_a_shell(&world, &format!("{ignore}ulimit -f {limit}"), command, "");
            let what = format!("{command}, at most {limit} blocks, {outcome:?}");
            assert_ne!(outcome.code, Some(0), "{what}");
            if ignored {
                let said = outcome.stderr.lines().last().unwrap_or_default();
                assert_eq!(outcome.code, Some(1), "{what}");
                assert!(said.starts_with("leank: ") && said.contains("too large"), "{what}");
                assert!(said.contains("ulimit -f"), "{what}");
            }
            let found = files(&world);
            for (path, bytes) in &found {
                let is_either = [&old, &new].map(|files| files.get(path) == Some(bytes));
                let is_left = !old.contains_key(path) && !new.contains_key(path);
                assert!(is_either.contains(&true) || (is_left && !ignored), "{path:?}: {what}");
            }
            let of = |files: &Files| -> Files {
                let own = |path: &PathBuf| path.starts_with(world.path(&format!("./{together}")));
                files.clone().into_iter().filter(|(path, _)| own(path)).collect()
            };
            if !together.is_empty() {
                let kept: Files = of(&found)
                    .into_iter()
                    .filter(|(path, _)| path.extension() != Some("tmp".as_ref()))
                    .collect();
                assert!(kept == of(&old) || kept == of(&new), "a mixture: {what}");
            }
            world.done(command);
            assert_eq!(files(&world).keys().collect::<Vec<_>>(), new.keys().collect::<Vec<_>>());
            assert!(files(&world) == new, "{what}");
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_behind_the_streams() {
    let world = World::with_mask();
    // What is said beside the result is lost, and no more.
    let learn = format!("{LEARN} --k-ratio 0.25 --out other.safetensors --pareto front");
    for command in [&learn, "convert mask.safetensors mask.npy"] {
        let outcome = in_a_shell(&world, ":", command, "2>/dev/full");
        assert_eq!(outcome.code, Some(0), "{command}: {outcome:?}");
    }
    let outcome = in_a_shell(&world, ":", "inspect nothing.npy", "2>/dev/full");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{outcome:?}");
    let plan = "plan --mask mask.safetensors --context 4096";
    for command in [
        "inspect mask.safetensors",
        "inspect mask.safetensors --json",
        plan,
        &learn,
        "man pages",
        "completions bash",
    ] {
        let outcome = in_a_shell(&world, ":", command, ">/dev/full");
        let said = outcome.stderr.lines().last().unwrap_or_default();
        assert_eq!(outcome.code, Some(1), "{command}: {outcome:?}");
        let words = ["writing to standard output", "No space left"];
        assert!(words.iter().all(|word| said.contains(word)), "{command}: {said}");
    }
}
