//! Exit codes, help, and standard output that goes away.

use std::{io::Read as _, process::Stdio};

use crate::world::{DUMP, LEARN, Outcome, World};

const COMMANDS: [(&str, &str); 14] = [
    ("demo", "See it work"),
    ("dump", "Record what a model's attention sees"),
    ("learn", "Learn from a dump which channels of K matter"),
    ("merge", "Join the records of machines"),
    ("eval", "Measure what a mask costs and saves"),
    ("check", "Say whether a mask suits a model"),
    ("inspect", "Show what a mask keeps"),
    ("convert", "Convert a mask between"),
    ("plan", "What a cache with this mask will take"),
    ("report", "Show on one page whether to trust a mask"),
    ("shard", "Split a mask over the ranks"),
    ("generate", "Continue a prompt"),
    ("completions", "Print completions for a shell"),
    ("man", "Write manual pages"),
];

#[test]
fn help_says_what_every_command_does() {
    let world = World::new();
    let all = world.done("--help");
    assert!(all.contains("Exit codes: 0 done, 1 it failed"), "{all}");
    for (command, purpose) in COMMANDS {
        assert!(all.contains(command) && all.contains(purpose), "{command}: {all}");
        let help = world.done(&format!("{command} --help"));
        assert!(help.starts_with(purpose), "{help}");
        assert!(help.contains("Usage: leank"), "{help}");
        // Every argument is explained: its line or the next one says more than its name.
        let lines: Vec<&str> = help.lines().map(str::trim).collect();
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("--")) {
            let next = lines.get(at + 1).copied().unwrap_or("");
            assert!(line.contains("  ") || !next.is_empty(), "{command}: {line} is not explained");
        }
    }
    assert_eq!(world.done("-V"), format!("leank {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_version_says_what_is_here() {
    let world = World::new();
    let told = world.done("--version");
    assert!(told.starts_with(&format!("leank {}\n", env!("CARGO_PKG_VERSION"))), "{told}");
    for word in ["features: cli", "cpu (", " kernel, ", "CUDA"] {
        assert!(told.contains(word), "no {word} in {told}");
    }
}

#[test]
fn a_package_can_bring_completions_and_manual_pages() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = world.done(&format!("completions {shell}"));
        assert!(script.contains("pareto") && script.contains("shard"), "{shell}: {script}");
    }
    let pages = world.done("man pages");
    assert_eq!(pages.lines().count(), COMMANDS.len() + 1, "{pages}");
    for (command, purpose) in COMMANDS {
        let page = String::from_utf8(world.read(&format!("pages/leank-{command}.1"))).unwrap();
        let page = page.replace("\\*(Aq", "'").replace("\\-", "-");
        assert!(
            page.contains(&format!(".TH leank-{command} 1")) && page.contains(purpose),
            "{page}"
        );
    }
    world.write("file", "");
    world.fails("man file", &["man: file"]);
}

#[test]
fn wrong_arguments_exit_with_2() {
    let world = World::new();
    let eval = "eval --model model --mask m.npy --text text.txt";
    for (arguments, word) in [
        ("", "Usage"),
        ("prune", "prune"),
        ("inspect", "<MASK>"),
        ("inspect m.npy --jason", "--jason"),
        ("learn dump --out m.npy", "--k-ratio"),
        ("learn dump --out m.npy --k-ratio 0.5 --bytes 0.5", "--bytes"),
        ("learn dump --out m.npy --k-ratio 1.5", "1.5 is not in 0..=1"),
        ("learn dump --out m.npy --k-ratio half", "`half` is not a number"),
        ("learn dump --out m.npy --k-ratio NaN", "NaN"),
        ("learn dump --k-ratio 0.5 --out m.npy --method e3", "e2, e1, static and leank"),
        ("dump --model model --text text.txt", "--out"),
        ("dump --model model --out d", "--text"),
        ("dump --model model --text text.txt --out d --prefix 9..3", "ends before it starts"),
        ("dump --model model --text text.txt --out d --dtype f8", "f32, f16 and bf16"),
        ("dump --model model --text text.txt --out d --probe guess", "guess"),
        ("dump --model model --text text.txt --out d --sequences -1", "-1"),
        (&format!("{eval} --tasks singing"), "passkey, needle, multikey"),
        ("plan --mask m.npy --memory lots", "lots"),
        ("plan --mask m.npy --memory 16parsec", "KiB, MiB, GiB"),
        ("convert a.npy b.pth --shape 3,x,8", "x"),
        ("convert a.npy b.pth --shape 0,2,8", "0"),
        ("learn dump --out m.npy --k-ratio -0.1", "0..=1"),
        ("check --model m --mask m.npy --text t --max-kl nan", "0 or more"),
        ("inspect m.npy --threads 1000000", "at most"),
        ("plan --mask m.npy --context 5000000000", "'--context"),
        ("plan --mask m.npy --context 100,18446744073709551615", "at most 4294967296 tokens"),
        ("report", "--mask"),
        ("report --mask m.npy --format png", "--figures"),
        ("report --mask m.npy --figures f --format gif", "svg, png"),
        ("generate --model model", "--prompt"),
        ("generate --model model --prompt a --sink 4", "--mask"),
        ("generate --model model --prompt a --recent 4", "--mask"),
        ("inspect m.npy --threads 0", "--threads"),
    ] {
        let outcome = world.run(arguments);
        assert_eq!(outcome.code, Some(2), "{arguments}: {outcome:?}");
        assert!(outcome.stderr.contains(word), "{arguments}: no {word:?} in: {}", outcome.stderr);
        assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
        assert_eq!(outcome.stdout, "", "{arguments}");
    }
}

#[test]
fn what_is_read_is_not_written_over() {
    let world = World::with_dump();
    world.done(&format!("{LEARN} --k-ratio 0.5 --out mask.safetensors"));
    let before = world.files();
    let words = &["is read too"];
    world.fails(&format!("{LEARN} --k-ratio 0.5 --out dump/layer-000.safetensors"), words);
    world.fails(&DUMP.replace("--out dump", "--out second --save-tokens text.txt"), words);
    let eval = "eval --model model --mask mask.safetensors --text other.txt";
    world.fails(&format!("{eval} --save-tokens other.txt"), words);
    world
        .fails(&format!("{eval} --save-tokens no/such.json"), &["--save-tokens", "no such folder"]);
    world.fails("report --mask mask.safetensors --out mask.safetensors", words);
    world.fails("demo --out dump", &["--out: dump", "something else than a demo"]);
    assert_eq!(world.files(), before);
    // A mask may lie beside the layers, and be made again.
    for _ in 0..2 {
        world.done(&format!("{LEARN} --k-ratio 0.5 --out dump/mask.safetensors"));
    }
}

#[test]
fn a_split_over_fewer_ranks_leaves_none_of_the_earlier() {
    let world = World::with_mask();
    for ranks in [2, 1] {
        world.done(&format!("shard mask.safetensors --world {ranks} --out ranks"));
        for rank in 0..2 {
            let there = world.path(&format!("ranks/rank-{rank}.safetensors")).exists();
            assert_eq!(there, rank < ranks, "rank {rank} of {ranks}");
        }
    }
}

/// Runs, reads `len` bytes of standard output and closes it.
fn cut_off(world: &World, arguments: &str, len: usize) -> Outcome {
    let mut child =
        world.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut vec![0; len]).unwrap();
    drop(stdout);
    Outcome::new(child.wait_with_output().unwrap())
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let world = World::with_mask();
    let generate = "generate --model model --prompt abc --tokens 200";
    for (arguments, len) in [
        ("inspect mask.safetensors", 0),
        ("inspect mask.safetensors", 1),
        ("inspect mask.safetensors --json", 0),
        ("plan --mask mask.safetensors", 0),
        ("convert mask.safetensors copy.npy", 0),
        (generate, 1),
        ("--help", 0),
        ("learn --help", 0),
    ] {
        let outcome = cut_off(&world, arguments, len);
        assert_eq!(outcome.code, Some(0), "{arguments}: {outcome:?}");
        assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
        assert!(!outcome.stderr.contains("leank: "), "{}", outcome.stderr);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_standard_output_is_an_error() {
    let world = World::with_mask();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = world.command("inspect mask.safetensors").stdout(full).output().unwrap();
    Outcome::new(output).assert_failed(&["standard output", "No space left"]);
}
