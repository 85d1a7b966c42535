use std::{
    io,
    os::fd::AsFd,
    os::fd::AsRawFd,
    path::PathBuf,
    process::{Command, Output},
    thread,
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use serde_json::Value;
use tailnode_tun::Netns;

use crate::Authority;

/// A network namespace of its own, with `lo` up and nothing else.
pub struct Namespace {
    netns: Netns,
    /// The file of CAs that its programs trust; `None`: the machine's own.
    trusted: Option<PathBuf>,
    /// Whether its programs log all that they can.
    loud: bool,
}

impl Namespace {
    /// Makes one. Panics when not root: a test that skips itself looks like one that passed.
    #[allow(
        clippy::new_without_default,
        reason = "a namespace is a thing, not a value"
    )]
    pub fn new() -> Namespace {
        assert!(
            geteuid().is_root(),
            "this test makes network namespaces: run `sudo make test`"
        );
        let netns = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare the network namespace");
            Netns::current().expect("open the new network namespace")
        })
        .join()
        .expect("a new network namespace");
        let namespace = Namespace {
            netns,
            trusted: None,
            loud: false,
        };
        namespace.ip("link set lo up");
        // Lets this process send pings without the raw sockets that would see everyone's answers.
        namespace
            .command("sysctl")
            .args(["-qw", "net.ipv4.ping_group_range=0 0"])
            .status()
            .expect("run sysctl");
        namespace
    }

    /// The namespace itself.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Lets the programs inside trust this authority, and those that are known to the whole world.
    pub fn trust(&mut self, authority: &Authority) {
        self.trusted = Some(authority.certificate());
    }

    /// Lets our programs inside log all that they can.
    pub fn logs_everything(&mut self) {
        self.loud = true;
    }

    /// A path to it, good for as long as this value lives.
    pub fn path(&self) -> PathBuf {
        let fd = self.netns.as_fd().as_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// A command that will run inside, and end when the thread that starts it does.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display()));
        command
            .args(["setpriv", "--pdeathsig", "KILL", "--"])
            .arg(program);
        if let Some(file) = &self.trusted {
            command.env("SSL_CERT_FILE", file);
        }
        if self.loud {
            command.env("RUST_LOG", "trace");
        }
        command
    }

    /// Runs a command line, its words parted by blanks, and returns what it printed. Panics when
    /// it fails.
    pub fn sh(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let output = self
            .command(words.next().expect("a command"))
            .args(words)
            .output()
            .unwrap_or_else(|error| panic!("cannot run `{line}`: {error}"));
        stdout_of(line, &output)
    }

    /// Runs `ip` with these words.
    pub fn ip(&self, line: &str) -> String {
        self.sh(&format!("ip {line}"))
    }

    /// Runs `ip -json` with these words and returns what it says.
    pub fn ip_json(&self, line: &str) -> Value {
        let text = self.ip(&format!("-json {line}"));
        if text.trim().is_empty() {
            return Value::Array(Vec::new());
        }
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`ip -json {line}`: {error}"))
    }

    /// The names of the links inside, `lo` left out.
    pub fn links(&self) -> Vec<String> {
        let links = self.ip_json("link show");
        let names = links
            .as_array()
            .into_iter()
            .flatten()
            .map(|link| link["ifname"].as_str());
        names
            .flatten()
            .filter(|&name| name != "lo")
            .map(str::to_owned)
            .collect()
    }

    /// Runs `f` inside, on a thread of its own: the sockets that it opens belong to the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        self.netns.run(f).map_err(io::Error::other)?
    }

    /// Gives `eth0` this address in place of those that it has, with this gateway.
    pub fn move_to(&self, address: &str, gateway: &str) {
        self.ip("address flush dev eth0 scope global");
        self.ip(&format!("address add {address} dev eth0"));
        self.ip(&format!("route add default via {gateway}"));
    }

    /// Joins this namespace and `other` by a veth pair, `name` here and `other_name` there, both
    /// up, with these addresses.
    pub fn link(
        &self,
        name: &str,
        address: &str,
        other: &Namespace,
        other_name: &str,
        theirs: &str,
    ) {
        let path = other.path();
        self.ip(&format!(
            "link add {name} type veth peer name {other_name} netns {}",
            path.display()
        ));
        for (namespace, name, address) in [(self, name, address), (other, other_name, theirs)] {
            namespace.ip(&format!("address add {address} dev {name}"));
            namespace.ip(&format!("link set {name} up"));
        }
    }
}

fn stdout_of(line: &str, output: &Output) -> String {
    assert!(
        output.status.success(),
        "`{line}`: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
