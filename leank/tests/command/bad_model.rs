//! Models that are cut short or not models at all.

use crate::{
    model::Tiny,
    world::{DUMP, World},
};

#[test]
fn a_gguf_file_cut_short() {
    let world = World::new();
    Tiny::default().write_gguf(&world.path("whole.gguf"));
    let bytes = world.read("whole.gguf");
    let generate = |model: &str| format!("generate --model {model} --prompt abc --tokens 2");
    world.done(&generate("whole.gguf"));
    for len in [4, 20, 100, 2000, bytes.len() / 2, bytes.len() - 40] {
        world.write("cut.gguf", &bytes[..len]);
        world.fails(&generate("cut.gguf"), &["cut.gguf", "GGUF", "fetch it again"]);
    }
    let dump = DUMP.replace("--model model", "--model cut.gguf");
    world.fails(&dump, &["cut.gguf", "fetch it again"]);
    for nothing in [&b""[..], b"GG", b"<html>not found</html>"] {
        world.write("cut.gguf", nothing);
        world.fails(&generate("cut.gguf"), &["cut.gguf", "GGUF"]);
    }
}

#[test]
fn a_folder_with_damaged_files() {
    let world = World::new();
    let generate = "generate --model model --prompt abc --tokens 2";
    world.done(generate);
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let name = format!("model/{file}");
        let whole = world.read(&name);
        for len in [0, 5, whole.len() / 2, whole.len() - 1] {
            world.write(&name, &whole[..len]);
            world.fails(generate, &[file, "fetch it again"]);
        }
        std::fs::remove_file(world.path(&name)).unwrap();
        world.fails(generate, &[file, "No such file"]);
        world.write(&name, whole);
    }
    world.done(generate);
}

#[test]
fn models_that_are_not_supported() {
    let world = World::new();
    let config = String::from_utf8(world.read("model/config.json")).unwrap();
    let generate = "generate --model model --prompt abc --tokens 2";
    world.write("model/config.json", config.replace("\"llama\"", "\"mamba\""));
    world.fails(
        generate,
        &["config.json", "mamba", "supported: llama, mistral, qwen2, qwen3, gemma3"],
    );
    world.write("model/config.json", config.replace("\"hidden_size\":32", "\"hidden_size\":64"));
    world.fails(generate, &["shape", "32", "64"]);
    world.write("model/config.json", config.replace("\"head_dim\":16", "\"head_dim\":0"));
    world.fails(generate, &["model: ", "head_dim"]);
}

#[test]
fn weights_that_are_not_numbers() {
    let world = World::new();
    let mut bytes = world.read("model/model.safetensors");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    world.write("model/model.safetensors", bytes);
    world.fails(DUMP, &["NaN", "check the weights"]);
}
