//! What owners of models rely on: shared work, records of runs, progress for programs, a guard.

use std::fs;

use serde_json::Value;

use crate::{
    model::Tiny,
    world::{DUMP, LEARN, World},
};

#[test]
fn processes_share_the_layers_of_a_dump() {
    let world = World::with_model(Tiny { layers: 5, ..Tiny::default() });
    world.done(DUMP);
    let formats = "--formats k16,k8,v16,v4";
    world.done(&format!("{LEARN} --bytes 0.3 {formats} --out whole.safetensors"));
    fs::remove_dir_all(world.path("dump/learn")).unwrap();
    // As an array of jobs runs them: each for itself, in any order, one of them twice.
    let shards = [("a", "3..5"), ("b", "0..2"), ("c", "2"), ("b", "0..2")];
    let children: Vec<_> = shards
        .into_iter()
        .map(|(records, layers)| {
            let shard = format!("{LEARN} {formats} --layers {layers} --records {records}");
            world.command(&shard).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert!(!world.path("dump/learn").exists());
    let said = world.done("merge a b c --out all");
    assert!(said.contains("10 records are new"), "{said}");
    let said = world.done("merge b c --out all");
    assert!(said.contains("0 records are new, 6 were there"), "{said}");
    world.done(&format!("{LEARN} --bytes 0.3 {formats} --records all --out merged.safetensors"));
    assert_eq!(world.read("merged.safetensors"), world.read("whole.safetensors"));

    world.fails(&format!("{LEARN} --layers 3..9 --records d"), &["--layers", "3..9", "0..5"]);
    world.fails("merge nothing --out all", &["--records", "nothing"]);
    let lambda = format!("{LEARN} --method leank --layers 0..2");
    world.fails(&lambda, &["--method", "over all layers"]);
}

/// The commands that a mask tells, on the inputs that it tells, make it again.
#[test]
fn a_mask_is_made_again_from_its_record() {
    let world = World::with_mask();
    let inspected = world.json("inspect mask.safetensors --json");
    let runs = inspected["info"]["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2, "{runs:?}");
    let command = |run: &Value| {
        let words: Vec<_> = run["command"].as_array().unwrap().iter().map(Value::as_str).collect();
        assert_eq!(words[0], Some("leank"));
        words[1..].iter().map(|word| word.unwrap()).collect::<Vec<_>>().join(" ")
    };
    let inputs: Vec<_> = runs[0]["inputs"].as_array().unwrap().iter().collect();
    let roles: Vec<_> = inputs.iter().map(|input| input["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["model", "model", "model", "text"], "{inputs:?}");
    let text = leank::files::sha256_hex(&world.read("text.txt"));
    assert_eq!(inputs[3]["sha256"], text.as_str());
    assert_eq!(runs[1]["inputs"][0]["role"], "dump");
    assert!(world.done("inspect mask.safetensors").contains("leank dump --model model"));

    fs::rename(world.path("dump"), world.path("old")).unwrap();
    world.done(&format!("{} --out dump", command(&runs[0])));
    world.done(&format!("{} --threads 1 -q --out again.safetensors", command(&runs[1])));
    assert_eq!(world.read("again.safetensors"), world.read("mask.safetensors"));
}

#[test]
fn a_killed_dump_goes_on_and_is_the_same() {
    let world = World::new();
    let dump = DUMP.replace("--sequences 4", "--sequences 40");
    world.done(&dump.replace("--out dump", "--out whole"));
    let mut child = world.command(&format!("{dump} --progress json")).spawn().unwrap();
    let partial = || {
        let entries = fs::read_dir(world.path(".")).unwrap().flatten();
        entries.map(|entry| entry.path().join("written.txt")).find(|path| path.exists())
    };
    // It may be moved to its place meanwhile.
    let text = || fs::read_to_string(partial()?).ok();
    let written = || text().map_or(0, |text| text.lines().count());
    let start = std::time::Instant::now();
    while written() < 12 && start.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "it ended before it was killed");
    let outcome = world.run(&format!("{dump} --progress json"));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let first: Value = serde_json::from_str(outcome.stderr.lines().next().unwrap()).unwrap();
    assert!(first["reused"].as_u64().unwrap() >= 5, "{first}");
    for file in ["manifest.json", "layer-000.safetensors", "layer-001.safetensors"] {
        assert_eq!(world.read(&format!("dump/{file}")), world.read(&format!("whole/{file}")));
    }
}

#[test]
fn events_are_json_and_end_at_the_end() {
    let world = World::with_dump();
    let outcome = world.run(&format!("{LEARN} --k-ratio 0.5 --out m.npy --progress json"));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let events: Vec<Value> =
        outcome.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = events.last().unwrap();
    assert_eq!((&last["event"], &last["phase"]), (&"progress".into(), &"elimination".into()));
    assert_eq!((&last["done"], &last["total"]), (&4.into(), &4.into()));
    let outcome = world.run("learn nothing --k-ratio 0.5 --out m.npy --progress json");
    assert_eq!(outcome.code, Some(1));
    let event: Value = serde_json::from_str(&outcome.stderr).unwrap();
    assert_eq!(event["event"], "error");
    assert!(event["message"].as_str().unwrap().contains("nothing: no such folder"), "{event}");
    // In a log, what is over in a moment says nothing.
    let outcome = world.run(&format!("{LEARN} --k-ratio 0.4 --out m.npy"));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_guard_tells_what_suits() {
    let world = World::with_mask();
    let check = "check --mask mask.safetensors --text other.txt --context 300 --positions 16 \
                 --sequences 3 --items 2 --tasks passkey";
    let run = |arguments: &str| {
        let outcome = world.run(arguments);
        assert_eq!(outcome.stderr, "", "{arguments}");
        (outcome.code, outcome.stdout)
    };
    // A model of random weights: only the limits decide.
    let (code, said) = run(&format!("{check} --model model --max-kl 100"));
    assert_eq!(code, Some(0), "{said}");
    for word in ["ok       model", "ok       windows", "ok       text", "suits this model"] {
        assert!(said.contains(word), "{said}");
    }
    assert!(said.contains("unknown  passkey"), "a random model finds nothing: {said}");
    let (code, said) = run(&format!("{check} --model model --max-kl 1e-12 --json"));
    assert_eq!(code, Some(3), "{said}");
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["suits"], false);
    assert_eq!(report["findings"][2]["verdict"], "failed");
    assert!(report["text"]["kl"].as_f64().unwrap() > 0.0);
    let (code, said) = run(&format!("{check} --model model --max-kl 100 --recent 4"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("warning  windows   sink 4, recent 4"), "{said}");

    // Another model of the same shape.
    Tiny { rope_base: 2000.0, ..Tiny::default() }.write_folder(&world.path("other"));
    let (code, said) = run(&format!("{check} --model other"));
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("FAILED   model") && said.contains("does NOT suit: model"), "{said}");
    assert!(!said.contains("text"), "nothing was measured: {said}");

    world.fails(
        "check --model model --mask mask.safetensors --text other.txt --context 60",
        &["--context", "nothing is pruned", "76 tokens"],
    );
}

/// Memory does not grow with the dump: one of 170 MB, learned from with 64 MiB for everything that is no
/// file.
#[cfg(target_os = "linux")]
#[test]
fn a_dump_may_be_larger_than_memory() {
    use leank::{Dtype, ModelShape, train::synthetic::Synthetic};

    let world = World::new();
    let synthetic = Synthetic {
        shape: ModelShape::new(1, 1, 1, 64).unwrap(),
        prefixes: vec![16_384; 40],
        positions: 2,
        draws: 1,
        dtype: Dtype::F16,
        seed: 5,
    };
    synthetic.write(&world.path("large")).unwrap();
    let size = fs::metadata(world.path("large/layer-000.safetensors")).unwrap().len();
    assert!(size > 160 << 20, "{size}");
    let limited = |kib: usize| {
        let command = format!(
            "ulimit -d {kib} && exec {} learn large --threads 1 --method e1 --align 16 --k-ratio 0.5 \
             --out large-{kib}.safetensors",
            env!("CARGO_BIN_EXE_leank")
        );
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &command]).current_dir(world.path("."));
        shell.output().unwrap()
    };
    let output = limited(64 << 10);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The limit is one: nothing works in 4 MiB.
    assert!(!limited(4 << 10).status.success());
}
