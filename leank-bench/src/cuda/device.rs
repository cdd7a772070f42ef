//! Random data on the device, its read bandwidth, and the time of work on it.

use std::sync::Arc;

use cudarc::{
    driver::{
        CudaFunction, CudaGraph, CudaSlice, CudaStream, DriverError, LaunchConfig,
        PushKernelArg as _,
        sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
    },
    nvrtc,
};
use leank_core::Dtype;

use crate::{Error, Result, stats::median};

/// 16-bit elements: f16 or bf16, as the caller says.
pub(crate) type Elements = CudaSlice<half::bf16>;

/// The device's side of the measurement.
pub(crate) struct Device {
    pub(super) stream: Arc<CudaStream>,
    noise: [CudaFunction; 2],
    read: CudaFunction,
}

pub(crate) fn driver(error: DriverError) -> Error {
    Error::Device(error.to_string())
}

/// Has cudarc order nothing by events, for a context whose work is all given to `stream`: events would
/// end up in captured graphs.
pub(crate) fn give_up_events(stream: &CudaStream) {
    // SAFETY: everything is given to this one stream, so that order needs no events.
    unsafe { stream.context().disable_event_tracking() };
}

/// Seconds that the device spends on what `work` gives to the stream. Waits.
pub(crate) fn seconds(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let event =
        || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
    let (start, end) = (event()?, event()?);
    start.record(stream).map_err(driver)?;
    work()?;
    end.record(stream).map_err(driver)?;
    Ok(f64::from(start.elapsed_ms(&end).map_err(driver)?) / 1e3)
}

/// Captures what `record` gives to the stream, which runs nothing.
pub(crate) fn capture(
    stream: &Arc<CudaStream>,
    record: impl FnOnce() -> Result<()>,
) -> Result<CudaGraph> {
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(driver)?;
    let recorded = record();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    // Also after a failure, so that the stream can be used again.
    let graph = stream.end_capture(flags).map_err(driver);
    recorded?;
    graph?.ok_or_else(|| Error::Device("nothing was captured".into()))
}

impl Device {
    pub(crate) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        give_up_events(stream);
        // bf16 numbers are converted from compute capability 8.0 on.
        let options = nvrtc::CompileOptions { arch: Some("compute_80"), ..Default::default() };
        let ptx = nvrtc::compile_ptx_with_opts(include_str!("probe.cu"), options)
            .map_err(|error| Error::Device(format!("probe.cu does not compile: {error}")))?;
        let module = stream.context().load_module(ptx).map_err(driver)?;
        let function = |name| module.load_function(name).map_err(driver);
        let noise = [function("noise_f16")?, function("noise_bf16")?];
        Ok(Self { stream: Arc::clone(stream), noise, read: function("read")? })
    }

    /// `count` random elements with variance `scale`².
    pub(crate) fn random(
        &self,
        dtype: Dtype,
        count: usize,
        seed: u64,
        scale: f32,
    ) -> Result<Elements> {
        let mut data = self.stream.alloc_zeros(count).map_err(driver)?;
        self.fill(dtype, &mut data, seed, scale)?;
        Ok(data)
    }

    /// Overwrites elements with random ones.
    pub(super) fn fill(
        &self,
        dtype: Dtype,
        data: &mut Elements,
        seed: u64,
        scale: f32,
    ) -> Result<()> {
        let count = data.len() as u64;
        let noise = &self.noise[usize::from(dtype == Dtype::Bf16)];
        let config =
            LaunchConfig { grid_dim: (2048, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(noise);
        launch.arg(data).arg(&count).arg(&seed).arg(&scale);
        // SAFETY: these are the kernel's parameters, and it writes `count` elements of two bytes.
        unsafe { launch.launch(config) }.map_err(driver)?;
        Ok(())
    }

    /// Bytes per second of a plain read of 4 GiB, or of a quarter of what is free.
    pub(super) fn read_bandwidth(&self) -> Result<f64> {
        let (free, _) = self.stream.context().mem_get_info().map_err(driver)?;
        let bytes = (free / 4).min(4 << 30) / 16 * 16;
        let data = self.random(Dtype::Bf16, bytes / 2, 1, 1.0)?;
        let sink = self.stream.alloc_zeros::<u32>(1).map_err(driver)?;
        let count = (bytes / 16) as u64;
        let mut best: f64 = 0.0;
        for (blocks, threads) in [(264, 1024), (528, 512), (1056, 256), (2112, 256), (4224, 128)] {
            let config = LaunchConfig {
                grid_dim: (blocks, 1, 1),
                block_dim: (threads, 1, 1),
                shared_mem_bytes: 0,
            };
            let mut pass = || {
                let mut launch = self.stream.launch_builder(&self.read);
                launch.arg(&data).arg(&count).arg(&sink);
                // SAFETY: these are the kernel's parameters; it reads `count` units of the data.
                unsafe { launch.launch(config) }.map_err(driver)?;
                Ok(())
            };
            pass()?;
            let seconds = self.time_calls(20.0, 5, &mut pass)?;
            best = best.max(bytes as f64 / seconds);
        }
        Ok(best)
    }

    /// Median seconds of a call that gives work to the stream, back to back.
    fn time_calls(
        &self,
        millis: f64,
        rounds: usize,
        call: &mut dyn FnMut() -> Result<()>,
    ) -> Result<f64> {
        let mut run = |count: usize| -> Result<f64> {
            let all = seconds(&self.stream, || (0..count).try_for_each(|_| call()))?;
            Ok(all / count as f64)
        };
        run(2)?;
        let once = run(3)?.max(1e-6);
        let count = ((millis / 1e3 / once) as usize).clamp(3, 2000);
        let times = (0..rounds).map(|_| run(count)).collect::<Result<Vec<_>>>()?;
        median(times).ok_or_else(|| Error::Device("no rounds".into()))
    }

    /// Captures what `record` gives to the stream, and times replays: median seconds.
    pub(super) fn time_graph(
        &self,
        millis: f64,
        rounds: usize,
        record: impl FnOnce() -> Result<()>,
    ) -> Result<f64> {
        self.stream.synchronize().map_err(driver)?;
        let graph = capture(&self.stream, record)?;
        self.time_calls(millis, rounds, &mut || graph.launch().map_err(driver))
    }

    /// Seconds that the device spends on what `work` gives to the stream, while the host is ahead of
    /// it: `before` gives it enough to do.
    pub(super) fn time_behind(
        &self,
        rounds: usize,
        mut before: impl FnMut() -> Result<()>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..rounds {
            before()?;
            times.push(seconds(&self.stream, &mut work)?);
        }
        median(times).ok_or_else(|| Error::Device("no rounds".into()))
    }
}
