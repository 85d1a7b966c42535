use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// One of the workspace's programs. Under cargo it is built from the tree as it is now; when the
/// test is run by itself, it is the one that lies beside it.
pub(crate) fn program(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        if let Some(cargo) = env::var_os("CARGO") {
            build(&cargo);
        }
        // target/debug/deps/TEST
        let test = env::current_exe().expect("the test's own path");
        test.ancestors()
            .nth(2)
            .expect("the target directory")
            .to_owned()
    });
    directory.join(name)
}

/// Which versions of the programs of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Release {
    /// Those of integration/peers, which everything is tested against.
    Pinned,
    /// Those of integration/peers/bench, which the bench measures as well.
    Newest,
}

/// One of the programs of others, built from the versions that integration/peers pins.
pub(crate) fn peer(name: &str) -> PathBuf {
    Release::Pinned.program(name)
}

impl Release {
    /// One of its programs, built where it is not yet.
    pub fn program(self, name: &str) -> PathBuf {
        static DIRECTORIES: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
        let (directory, folder) = match self {
            Release::Pinned => (&DIRECTORIES[0], None),
            Release::Newest => (&DIRECTORIES[1], Some("bench")),
        };
        directory.get_or_init(|| built(folder)).join(name)
    }
}

fn built(folder: Option<&str>) -> PathBuf {
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/../integration/peers/build");
    let output = Command::new(build)
        .args(folder)
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("{build}: {error}"));
    assert!(output.status.success(), "{build} failed");
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

/// Runs a command to its end and returns what it printed, or what it had to say of its failure.
pub(crate) fn ask(mut command: Command) -> Result<String, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

/// The same, with this on its standard input. What it says of itself comes before what it printed.
pub(crate) fn tell(mut command: Command, input: &str) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("its standard input");
    // One that has seen enough does not read on.
    let _read = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().expect("its output");
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    match output.status.success() {
        true => Ok(text.into_owned()),
        false => Err(text.into_owned()),
    }
}

fn build(cargo: &OsStr) {
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--manifest-path"]);
    build.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    for package in [
        "tailnode-plugin",
        "tailnode-netavark-driver",
        "tailnode-cli",
        "tailnode-control-server",
    ] {
        build.args(["--package", package]);
    }
    assert!(
        build.status().expect("run cargo").success(),
        "the programs do not build"
    );
}

/// A server that runs for as long as this value lives.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it, with its output going to a file.
    pub fn spawn(mut command: Command, log: PathBuf) -> Process {
        let output = File::create(&log).expect("create the log");
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("share the log"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Process { child, log }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it printed.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end, waits for that, and panics when it must be killed.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        eventually(
            "the process ends when it is asked to",
            Duration::from_secs(15),
            || !self.is_running(),
        );
    }

    /// Ends it without asking.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("wait for a killed process");
    }

    /// Sends it a signal, if it still runs.
    pub fn signal(&mut self, signal: Signal) {
        // Waited for already, its number may be another process's by now.
        if self.is_running() {
            kill(Pid::from_raw(self.child.id() as i32), signal).expect("signal a child");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
        if self.is_running() {
            let _ended_already = self.child.kill();
            let _waited_already = self.child.wait();
        }
    }
}

/// Tries until it is so. Panics when it is not so within the time.
pub fn eventually(what: &str, within: Duration, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a directory holds nothing, or does not exist.
pub(crate) fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}
