//! A worker that answers timing commands, one line each, so that a driver can run it in turn with
//! workers of other libraries under the same conditions.

use std::{
    io::{self, BufRead, Write},
    time::{Duration, Instant},
};

use leank_core::{Dtype, HeadPrecision};
use leank_cpu::{Cpu, CpuCache};

use crate::{
    Result,
    setting::HeadShape,
    stats::median,
    workload::{Variant, Workload, WorkloadOptions},
};

/// A worker and the cache that it was last told to set up.
#[derive(Debug)]
pub struct Worker {
    backend: Cpu,
    variant: Variant,
    formats: HeadPrecision,
    footprint: u64,
    workload: Option<Workload<CpuCache>>,
}

impl Worker {
    /// A worker whose caches are of one variant, with lean blocks in these formats, and hold at least
    /// `footprint` bytes.
    #[must_use]
    pub fn new(backend: Cpu, variant: Variant, formats: HeadPrecision, footprint: u64) -> Self {
        Self { backend, variant, formats, footprint, workload: None }
    }

    /// Answers commands until `quit` or the end of the input.
    ///
    /// # Errors
    /// When a line cannot be read or an answer cannot be written. What a command asks in vain is
    /// an answer, `unsupported REASON`.
    pub fn serve(mut self, commands: impl BufRead, mut answers: impl Write) -> io::Result<()> {
        for line in commands.lines() {
            let line = line?;
            let words: Vec<&str> = line.split_whitespace().collect();
            let answer = match words[..] {
                [] => continue,
                ["quit"] => break,
                ["setup", dtype, query_heads, kv_heads, head_dim, context, ..] => {
                    let heads = format!("{query_heads}/{kv_heads}x{head_dim}");
                    self.setup(dtype, &heads, context)
                }
                ["run", millis] => self.run(millis),
                ["err"] => self.error(),
                _ => Err(format!("`{line}` is no command: setup, run, err, quit")),
            };
            let answer = answer.unwrap_or_else(|why| format!("unsupported {why}"));
            writeln!(answers, "{}", answer.replace('\n', " "))?;
            answers.flush()?;
        }
        Ok(())
    }

    fn setup(&mut self, dtype: &str, heads: &str, context: &str) -> Result<String, String> {
        // One cache at a time: the old one goes before the new one comes.
        self.workload = None;
        let (variant, formats, footprint) = (self.variant, self.formats, self.footprint);
        // The protocol's word for caches in 8 bits, beside which ours with codes are measured.
        let coded = formats != HeadPrecision::default() && variant != Variant::Dense;
        let dtype = match dtype {
            "q8_0" if coded => Dtype::Bf16,
            "q8_0" => {
                return Err("q8_0: full blocks are not; give a lean variant and formats".into());
            }
            _ => dtype.parse().map_err(text)?,
        };
        let shape: HeadShape = heads.parse().map_err(text)?;
        let context = context.parse().map_err(|_| format!("`{context}` is no context"))?;
        let options =
            WorkloadOptions { shape, context, sequences: 1, dtype, variant, formats, footprint };
        let workload = Workload::new(&self.backend, &options).map_err(text)?;
        let answer = format!("ok {:.0} {}", workload.call_bytes(), workload.layers());
        self.workload = Some(workload);
        Ok(answer)
    }

    fn run(&mut self, millis: &str) -> Result<String, String> {
        let least: f64 = millis.parse().map_err(|_| format!("`{millis}` are no milliseconds"))?;
        let least = Duration::try_from_secs_f64(least / 1e3).map_err(text)?;
        let workload = self.workload.as_mut().ok_or("run: nothing is set up")?;
        let begin = Instant::now();
        let mut passes = Vec::new();
        // Three at least, so that the median means something.
        while passes.len() < 3 || begin.elapsed() < least {
            let start = Instant::now();
            workload.sweep().map_err(text)?;
            passes.push(start.elapsed().as_secs_f64() / workload.layers() as f64);
        }
        let fastest = passes.iter().copied().fold(f64::INFINITY, f64::min);
        let count = passes.len();
        let median = median(passes).unwrap_or_default();
        Ok(format!("t {median:.9} {fastest:.9} {count}"))
    }

    fn error(&mut self) -> Result<String, String> {
        let workload = self.workload.as_mut().ok_or("err: nothing is set up")?;
        let (relative, largest) = workload.error().map_err(text)?;
        Ok(format!("e {relative:.3e} {largest:.3e}"))
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use leank_cpu::Serial;

    use super::*;

    fn talk(variant: Variant, formats: &str, commands: &str) -> Vec<String> {
        let backend = Cpu::with_executor(Arc::new(Serial));
        let worker = Worker::new(backend, variant, formats.parse().unwrap(), 1 << 20);
        let mut answers = Vec::new();
        worker.serve(commands.as_bytes(), &mut answers).unwrap();
        String::from_utf8(answers).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_conversation() {
        for (variant, formats, dtype, error) in [
            (Variant::Dense, "k16v16", "f16", 1e-5),
            (Variant::Dense, "k16v16", "bf16", 1e-2),
            (Variant::Llama, "k16v16", "f32", 1e-5),
            (Variant::Qwen, "k16v16", "f16", 1e-5),
            (Variant::Llama, "k8v4", "q8_0", 0.2),
        ] {
            let commands = format!("setup {dtype} 8 4 64 1024 -\nrun 1\nerr\nquit\nrun 1\n");
            let answers = talk(variant, formats, &commands);
            let [ok, t, e] = &answers[..] else { panic!("{answers:?}") };
            let bytes: f64 = ok.split(' ').nth(1).unwrap().parse().unwrap();
            let dense = 2.0 * 4.0 * 64.0 * 1024.0 * if dtype == "f32" { 4.0 } else { 2.0 };
            assert!(if variant == Variant::Dense { bytes == dense } else { bytes < dense }, "{ok}");
            let seconds: Vec<f64> = t.split(' ').skip(1).map(|x| x.parse().unwrap()).collect();
            assert!(seconds[0] >= seconds[1] && seconds[1] > 0.0 && seconds[2] >= 3.0, "{t}");
            let relative: f64 = e.split(' ').nth(1).unwrap().parse().unwrap();
            assert!(relative < error, "{variant:?} {dtype} {formats}: {e}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_said_and_the_worker_goes_on() {
        let commands = "run 1\nerr\nsetup q8_0 8 4 64 1024 -\nsetup f16 9 4 64 1024 -\n\
                        setup f16 8 4 64 1000 -\nsing\nrun x\n\nsetup f16 2 1 64 64 -\n";
        let answers = talk(Variant::Dense, "k8v8", commands);
        assert_eq!(answers.len(), 8);
        assert!(
            answers[..7].iter().all(|answer| answer.starts_with("unsupported ")),
            "{answers:?}"
        );
        assert!(answers[2].contains("q8_0") && answers[4].contains("multiple of 64"));
        assert!(answers[7].starts_with("ok "));
    }
}
