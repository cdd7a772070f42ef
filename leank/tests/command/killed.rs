//! `learn` killed at any moment goes on where it was and ends with the same mask; what a killed
//! `dump` leaves, the next one removes.

use std::{
    fs,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    model::Tiny,
    world::{DUMP, World},
};

const LAYERS: usize = 5;

/// Records below `folder`, which may be changing. Unfinished ones have other names.
fn recorded(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.path() {
            path if path.is_dir() => recorded(&path),
            path => usize::from(path.extension().is_some_and(|end| end == "json")),
        })
        .sum()
}

#[test]
fn a_killed_learn_resumes_to_the_same_mask() {
    let world = World::with_model(Tiny { layers: LAYERS, ..Tiny::default() });
    world.done(&DUMP.replace("--positions 8 --prefix 60..90", "--positions 48 --prefix 300..400"));
    for method in ["e2 --step 1", "leank --step 4"] {
        let learn = |mask: &str| {
            format!(
                "learn dump --align 4 --sink 4 --recent 8 --bytes 0.6 --threads 1 --out {mask} \
                 --method {method}"
            )
        };
        let records = world.path("dump/learn");
        world.done(&learn("undisturbed.safetensors"));
        let all = recorded(&records);
        fs::remove_dir_all(&records).unwrap();

        // Killed before the first record, then after each one more.
        let mut midway = 0;
        for layer in 0..LAYERS {
            let mut child = world.command(&learn("mask.safetensors")).spawn().unwrap();
            let start = Instant::now();
            while recorded(&records) < layer && start.elapsed() < Duration::from_secs(60) {
                sleep(Duration::from_millis(1));
            }
            sleep(Duration::from_millis(3 * layer as u64));
            child.kill().unwrap();
            let ended = child.wait().unwrap();
            midway += usize::from(!ended.success() && (1..all).contains(&recorded(&records)));
            assert_eq!(world.path("mask.safetensors").exists(), ended.success());
        }
        assert!(midway >= 2, "{method}: it ended before it was killed");
        world.done(&learn("mask.safetensors"));
        assert_eq!(world.read("mask.safetensors"), world.read("undisturbed.safetensors"));
        assert_eq!(recorded(&records), all);
        for mask in ["mask.safetensors", "undisturbed.safetensors"] {
            fs::remove_file(world.path(mask)).unwrap();
        }
        fs::remove_dir_all(&records).unwrap();
    }
}

#[test]
fn the_next_dump_removes_what_a_killed_one_left() {
    let world = World::new();
    let partial = || {
        let entries = fs::read_dir(world.path(".")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".dump.partial-")).count()
    };
    let mut child =
        world.command(&DUMP.replace("--sequences 4", "--sequences 400")).spawn().unwrap();
    let start = Instant::now();
    while partial() == 0 && start.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(1));
    }
    // Another dump of the same name leaves a running one alone.
    world.done(&format!("{DUMP} --overwrite"));
    assert_eq!(partial(), 1);
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it ended before it was killed");
    assert_eq!(partial(), 1);
    world.done(&format!("{DUMP} --overwrite"));
    assert_eq!(partial(), 0);
}
