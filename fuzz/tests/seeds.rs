//! Every seed, and every input that once failed, through its target: without a fuzzer.

use std::{fs, path::Path};

use leank_fuzz::Target;

#[test]
fn seeds_hold() {
    for (name, target) in leank_fuzz::TARGETS {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = fuzz.join("seeds").join(name);
        let seeds = run(&folder, target);
        assert!(seeds > 0, "{} is empty", folder.display());
        run(&fuzz.join("../attacks").join(name), target);
    }
}

/// Runs the files of a folder, where there is one; how many.
fn run(folder: &Path, target: Target) -> usize {
    let mut files = 0;
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        target(&fs::read(&path).unwrap());
        files += 1;
    }
    files
}

#[test]
fn every_target_has_a_binary() {
    let manifest = include_str!("../Cargo.toml");
    for (name, _) in leank_fuzz::TARGETS {
        assert!(manifest.contains(&format!("fuzz_targets/{name}.rs")), "{name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), leank_fuzz::TARGETS.len());
}
