//! Why a container does not start, said so that it reaches the person at the prompt.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt, process::parent_id},
    path::{Path, PathBuf},
};

use serde_json::json;

/// Says it. runc repeats a hook's standard error; crun gives hooks /dev/null for one, and writes into
/// its log, for Podman to show, only that one of them failed. So with crun another log takes the
/// place of its own.
pub fn say(message: &str) {
    eprintln!("{message}");
    if stderr_is_null().unwrap_or(false)
        && let Err(error) = replace_log(message)
    {
        // There is nobody else to tell.
        eprintln!("tailnode-hook: {error}");
    }
}

fn stderr_is_null() -> io::Result<bool> {
    let device = |path| fs::metadata(path).map(|of: fs::Metadata| of.rdev());
    Ok(device("/proc/self/fd/2")? == device("/dev/null")?)
}

/// What the runtime writes from now on goes to a file without a name.
fn replace_log(message: &str) -> io::Result<()> {
    let arguments = fs::read(format!("/proc/{}/cmdline", parent_id()))?;
    let Some(log) = log_of(&arguments) else {
        return Ok(());
    };
    let ours = log.with_extension("tailnode");
    let line = json!({ "msg": message, "level": "error" });
    fs::write(&ours, format!("{line}\n"))?;
    fs::rename(&ours, &log)
}

/// Where a runtime with these arguments, each ended by a zero, writes its log.
fn log_of(arguments: &[u8]) -> Option<PathBuf> {
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.find(|argument| *argument == b"--log")?;
    Some(Path::new(OsStr::from_bytes(arguments.next()?)).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_an_argument_of_the_runtime() {
        let crun = b"/usr/bin/crun\0--log-format=json\0--log\0/run/c1/oci-log\0create\0c1\0";
        assert_eq!(log_of(crun), Some("/run/c1/oci-log".into()));
        assert_eq!(log_of(b"crun\0create\0c1\0"), None);
        assert_eq!(log_of(b"crun\0--log"), None);
    }
}
