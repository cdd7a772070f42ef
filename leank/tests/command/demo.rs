//! `leank demo`: the embedded model, and what the demonstration promises of it.

use serde_json::Value;

use crate::world::World;

const DEMO: &str = "demo --context 1024 --items 8 --progress none";

fn right(task: &Value, which: &str) -> u64 {
    task[which].as_u64().unwrap()
}

/// Facts found over all tasks by the mask of a name: densely, through the mask, and how many there are.
fn found(measured: &Value, name: &str) -> (u64, u64, u64) {
    let all = measured.as_array().unwrap();
    let is_it =
        |own: &&Value| own["mask"].as_str().unwrap().ends_with(&format!("{name}.safetensors"));
    let tasks = all.iter().find(is_it).unwrap()["tasks"].as_array().unwrap();
    let sum = |which| tasks.iter().map(|task| right(task, which)).sum();
    (sum("dense_right"), sum("lean_right"), sum("items"))
}

#[test]
fn it_shows_what_it_promises_and_again() {
    let world = World::new();
    let table = world.done(DEMO);
    for name in ["everything kept", "70 % pruned", "by their norms", "tokens/s", "report.html"] {
        assert!(table.contains(name), "no {name} in {table}");
    }
    let page = String::from_utf8(world.read("leank-demo/report.html")).unwrap();
    assert!(page.contains("leank-demo") && page.contains("<svg"), "not a report");

    let measured: Value = serde_json::from_slice(&world.read("leank-demo/eval.json")).unwrap();
    let (dense, lean, items) = found(&measured, "k70");
    assert_eq!(items, 24);
    assert!(dense as f64 >= 0.98 * items as f64, "dense finds {dense} of {items}");
    assert!(lean as f64 >= 0.97 * dense as f64, "E2 finds {lean}, dense {dense}");
    let (_, norms, _) = found(&measured, "norms");
    assert!(dense as f64 - norms as f64 >= 0.2 * items as f64, "norms find {norms} of {dense}");

    // The same commands again, on one thread: the same mask.
    world.done(
        "dump --model leank-demo/model --text leank-demo/learn.txt --sequences 12 --out again --threads 1 -q",
    );
    world.done("learn again --k-ratio 0.7 --align 8 --out again.npy --threads 1 -q");
    world.done("convert leank-demo/k70.safetensors first.npy");
    assert_eq!(world.read("again.npy"), world.read("first.npy"));
}

#[test]
fn what_it_cannot_do_is_said_before_it_begins() {
    let world = World::new();
    let outcome = world.run("demo --out text.txt");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("--out: text.txt: is a file"), "{outcome:?}");
    let outcome = world.run("demo --context 100");
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stderr.contains("1024..=8192"), "{outcome:?}");
}
