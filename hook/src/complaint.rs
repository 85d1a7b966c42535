//! Why a container does not start, said so that it reaches the person at the prompt.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::MetadataExt, process::parent_id},
    path::PathBuf,
};

/// Says it. runc repeats a hook's standard error; crun gives hooks /dev/null for one, and writes into
/// its log, for Podman to show, only that one of them failed. So with crun the words go to crun's
/// own standard error, which Podman shows when it finds no JSON in that log.
pub fn say(message: &str) {
    eprintln!("{message}");
    if stderr_is_null().unwrap_or(false)
        && let Err(error) = say_for_parent(message)
    {
        // There is nobody else to tell.
        eprintln!("tailnode-hook: {error}");
    }
}

fn stderr_is_null() -> io::Result<bool> {
    let device = |path| fs::metadata(path).map(|of: fs::Metadata| of.rdev());
    Ok(device("/proc/self/fd/2")? == device("/dev/null")?)
}

fn say_for_parent(message: &str) -> io::Result<()> {
    let parent = PathBuf::from(format!("/proc/{}", parent_id()));
    let arguments = fs::read(parent.join("cmdline"))?;
    let mut arguments = arguments.split(|byte| *byte == 0);
    let log = arguments
        .find(|argument| *argument == b"--log")
        .and_then(|_| arguments.next());
    let line = format!("{message}\n");
    if let Some(log) = log {
        let log = std::ffi::OsStr::from_bytes(log);
        let mut log: File = OpenOptions::new().append(true).open(log)?;
        log.write_all(line.as_bytes())?;
    }
    let mut stderr = OpenOptions::new().write(true).open(parent.join("fd/2"))?;
    stderr.write_all(line.as_bytes())
}
