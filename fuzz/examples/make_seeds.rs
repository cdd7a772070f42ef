//! Writes the seeds under `seeds/`: `cargo run --example make_seeds`. The files it writes depend
//! on nothing but this source; inputs that once failed lie beside them and are left alone.

use std::{fs, path::Path};

use leank_core::{
    ChannelMask, Dtype, Fingerprint, InputRecord, MaskInfo, ModelMask, ModelShape, RunRecord,
    Windows,
    files::{Format, to_bytes},
};
use leank_fuzz::{SOUND_TOKENIZERS, join, sound_tokenizer, torch_archive};
use leank_train::dump::{FORMAT_VERSION, Manifest, Probe, SequenceInfo};
use sha2::{Digest as _, Sha256};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    masks()?;
    pickles()?;
    tables()?;
    manifests()?;
    models()?;
    tokenizers()?;
    learning()?;
    kernels()?;
    operations()?;
    saved()
}

fn write(target: &str, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join(name), bytes)?)
}

fn fingerprint() -> Result<Fingerprint, Failure> {
    Ok(Fingerprint {
        architecture: "llama".into(),
        shape: ModelShape::new(2, 4, 2, 8)?,
        rope_base: 1e5,
        rope_scaling: None,
        config_hash: "0123".into(),
        sliding: None,
    })
}

fn masks() -> Result<(), Failure> {
    let heads = vec![
        ChannelMask::none(8),
        ChannelMask::new(8, vec![1, 2, 5, 7])?,
        ChannelMask::all(8),
        ChannelMask::all(8),
    ];
    let bare = ModelMask::new(2, 2, 8, heads)?;
    let info = MaskInfo {
        model_id: Some("model".into()),
        fingerprint: Some(fingerprint()?),
        windows: Some(Windows::default()),
        alignment: Some(4),
        exempt_layers: vec![1],
        ..MaskInfo::default()
    };
    let scores = (0..32).map(|at| at as f32).collect();
    let rich = bare.clone().with_info(info)?.with_scores(scores)?;
    write("mask_native", "bare", &to_bytes(&bare, Format::Native)?)?;
    write("mask_native", "rich", &to_bytes(&rich, Format::Native)?)?;
    write("mask_pth", "own", &to_bytes(&bare, Format::Pth)?)?;
    write("mask_npy", "own", &to_bytes(&bare, Format::Npy)?)?;
    for (name, header, data) in [
        ("fortran", "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 1, 1), }", 8),
        ("big_endian", "{'descr': '>i2', 'fortran_order': False, 'shape': (1, 2, 2), }", 8),
        ("record", "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }", 8),
    ] {
        let length = (header.len() as u16).to_le_bytes();
        let bytes = [b"\x93NUMPY\x01\0", &length[..], header.as_bytes(), &vec![0; data]].concat();
        write("mask_npy", name, &bytes)?;
    }
    Ok(())
}

fn pickles() -> Result<(), Failure> {
    let tensor: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\nq\0((X\x07\0\0\0storageq\x01ctorch\n\
        FloatStorage\nq\x02X\x01\0\0\x000q\x03X\x03\0\0\0cpuq\x04K\x06tq\x05QK\0K\x01K\x02K\x03\x87\
        q\x06K\x06K\x03K\x01\x87q\x07\x89ccollections\nOrderedDict\nq\x08)Rq\x09tq\x0aRq\x0b";
    let plain = [b"\x80\x02", tensor, b"."].concat();
    let dictionary = [b"\x80\x02}q\x20X\x01\0\0\0mq\x21", tensor, b"s."].concat();
    let parameter = [b"\x80\x02ctorch._utils\n_rebuild_parameter\n(", tensor, b"\x88NtR."].concat();
    let later: &[u8] = b"\x80\x04\x95\x80\0\0\0\0\0\0\0\x8c\x0ctorch._utils\x94\x8c\x12\
        _rebuild_tensor_v2\x94\x93\x94((\x8c\x07storage\x94\x8c\x05torch\x94\x8c\x0cFloatStorage\
        \x94\x93\x94\x8c\x010\x94\x8c\x03cpu\x94K\x06t\x94QK\0K\x01K\x02K\x03\x87\x94K\x06K\x03K\x01\
        \x87\x94\x89\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94t\x94R\x94.";
    write("mask_pth", "pickle_protocol_2", &plain)?;
    write("mask_pth", "pickle_protocol_4", later)?;
    write("mask_pth", "pickle_dictionary", &dictionary)?;
    write("mask_pth", "pickle_parameter", &parameter)?;
    write("mask_pth", "pickle_system", b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.")?;
    write("mask_pth", "archive", &torch_archive(&plain, &[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]))
}

fn tables() -> Result<(), Failure> {
    for (name, text) in [
        ("layers", "\x02\x01\x02\x7d\x010.9\t1.000000000000000000e-01\n0.2\t0.8\n"),
        ("heads", "\x02\x02\x02\x7d\x02# header\n1 0\n0 1\n\n0.5 0.5\n-0.5 2\n"),
        ("ragged", "\x02\x01\x02\x7d\x011 0\n1\n"),
        ("nan", "\x01\x01\x02\x7d\x011,nan\n"),
    ] {
        write("mask_tsv", name, text.as_bytes())?;
    }
    Ok(())
}

fn manifests() -> Result<(), Failure> {
    let fingerprint = fingerprint()?;
    let mut manifest = Manifest {
        version: FORMAT_VERSION,
        model_id: "model".into(),
        shape: fingerprint.shape,
        fingerprint,
        dtype: Dtype::F16,
        probe: Probe::Fisher,
        draws: 2,
        positions: 4,
        seed: 7,
        sequences: vec![SequenceInfo::new(5, 4, "a.txt"), SequenceInfo::new(0, 2, "b.txt")],
        run: None,
    };
    let path = Path::new("seed");
    write("manifest", "good", &manifest.to_json(path)?)?;
    let inputs =
        vec![InputRecord { role: "text".into(), name: "a.txt".into(), sha256: "0".repeat(64) }];
    let command = vec!["leank".into(), "dump".into()];
    manifest.run = Some(RunRecord { command, created_by: "leank".into(), seed: 7, inputs });
    write("manifest", "run", &manifest.to_json(path)?)?;
    manifest.sequences[0].valid = vec![3, 1];
    write("manifest", "descending", &manifest.to_json(path)?)?;
    manifest.version = 99;
    write("manifest", "newer", &manifest.to_json(path)?)
}

/// A folder of the sound attack file, as one input; GGUF files are taken from there as they are.
fn models() -> Result<(), Failure> {
    let attacks = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attacks");
    write("gguf", "llama", &fs::read(attacks.join("gguf/sound-llama.gguf"))?)?;
    let read = |name: &str| fs::read(attacks.join("models/sound").join(name));
    let (config, weights) = (read("config.json")?, read("model.safetensors")?);
    write("model_folder", "llama", &join(&config, &weights))?;
    let whole: serde_json::Value = serde_json::from_slice(&config)?;
    for (name, changes) in [
        ("qwen3", serde_json::json!({"model_type": "qwen3", "layer_types": ["full_attention"]})),
        (
            "qwen2",
            serde_json::json!({"model_type": "qwen2", "rope_scaling": {"type": "yarn",
            "factor": 4.0, "original_max_position_embeddings": 16}}),
        ),
        (
            "gemma3",
            serde_json::json!({"model_type": "gemma3_text", "sliding_window": 4,
            "sliding_window_pattern": 2, "hidden_activation": "gelu_pytorch_tanh"}),
        ),
        (
            "llama3",
            serde_json::json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 1e4}}),
        ),
    ] {
        let mut changed = whole.clone();
        let fields = changed.as_object_mut().ok_or("an object")?;
        fields.extend(changes.as_object().ok_or("an object")?.clone());
        write("model_folder", name, &join(changed.to_string().as_bytes(), &weights))?;
    }
    Ok(())
}

/// Sound tokenizers as they are, and unchanged with a text.
fn tokenizers() -> Result<(), Failure> {
    for (of, (name, _)) in (0u8..).zip(SOUND_TOKENIZERS) {
        write("tokenizer", name, sound_tokenizer(of).to_string().as_bytes())?;
        let text = "The <s> ab, Cd 12\u{a0}\u{3b1}\u{301}";
        write("tokenizer", &format!("{name}_text"), &[&[of, 0], text.as_bytes()].concat())?;
    }
    Ok(())
}

/// The sound dump of the attack files as one input, and records by hand.
fn learning() -> Result<(), Failure> {
    let sound = Path::new(env!("CARGO_MANIFEST_DIR")).join("../attacks/dumps/sound");
    let read = |name: &str| fs::read(sound.join(name));
    write("dump", "sound", &join(&read("manifest.json")?, &read("layer-000.safetensors")?))?;
    let head = r#"{"order":[7,6,5,4,3,2,1,0],"counts":[0,4,8],"losses":"#;
    let record = |losses: &str| {
        let head = format!("{head}[{losses}]}}");
        format!(r#""version":1,"dump":"@","layer":0,"heads":[{head},{head}]}}"#)
    };
    let curves = record("2.5,0.5,0.0");
    let precisions = record(&vec!["0.5"; 27].join(","));
    for (name, kind, text) in [
        ("curves", b'0', format!(r#"{{"sum":"00000000",{curves}"#)),
        ("no_sum", b'0', format!("{{{curves}")),
        ("precisions", b'1', format!(r#"{{"sum":"00000000",{precisions}"#)),
    ] {
        write("record", name, &[&[kind], text.as_bytes()].concat())?;
    }
    Ok(())
}

fn kernels() -> Result<(), Failure> {
    let cubin = b"machine code";
    write("kernel", "sound", &[b"LEANKCB1", &Sha256::digest(cubin)[..], cubin].concat())?;
    write("kernel", "short", b"LEANKCB1")
}

/// Bytes of several lengths from a fixed generator: `arbitrary` makes operations of any bytes.
fn operations() -> Result<(), Failure> {
    let mut state = 0x853c_49e6_748f_ea9b_u64;
    for (name, length) in [("a", 64), ("b", 128), ("c", 256), ("d", 512), ("e", 512), ("f", 1024)] {
        let byte = |_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 56) as u8
        };
        write("cache_ops", name, &(0..length).map(byte).collect::<Vec<u8>>())?;
    }
    Ok(())
}

/// Edits of a sound stream: place (two bytes) and value. What the places are, the format's
/// documentation tells.
fn saved() -> Result<(), Failure> {
    write("saved_sequence", "sound", b"")?;
    write("saved_sequence", "fewer_tokens", &[52, 0, 20])?;
    write("saved_sequence", "more_tokens", &[56, 0, 1])?;
    write("saved_sequence", "more_lean", &[60, 0, 5])?;
    write("saved_sequence", "infinite", &[200, 0, 0x7c, 201, 0, 0x7c, 202, 0, 0x7c])?;
    write("saved_sequence", "not_one", b"LEANKSEQ\x01\0\0\0\xff\xff\xff\xff")
}
