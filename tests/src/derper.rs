use std::{
    net::{Ipv4Addr, TcpStream},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Authority, Namespace, Underlay, eventually,
    program::{Process, peer},
};

const PORT: u16 = 3340;
const STUN_PORT: u16 = 3478;

/// Tailscale's own relay, with its STUN, at an address of the underlay's router. It serves
/// everyone.
pub struct Derper {
    // Goes before the directory that its log is in.
    process: Process,
    directory: TempDir,
    address: Ipv4Addr,
    certificates: Option<String>,
}

impl Derper {
    /// Starts one that speaks plain HTTP, or TLS with a certificate of this authority.
    pub fn start(underlay: &Underlay, address: Ipv4Addr, authority: Option<&Authority>) -> Derper {
        let certificates = authority.map(|authority| {
            authority.issue(address);
            authority.directory().to_string_lossy().into_owned()
        });
        let directory = TempDir::new().expect("a directory for derper");
        let process = spawn(underlay, address, certificates.as_deref(), &directory, &[]);
        let derper = Derper {
            process,
            directory,
            address,
            certificates,
        };
        derper.wait_until_it_answers(underlay);
        derper
    }

    /// Its region of a DERP map, as `tailcfg.DERPRegion` is written.
    pub fn region(&self, id: u32, code: &str) -> Value {
        let address = self.address.to_string();
        json!({
            "RegionID": id, "RegionCode": code, "RegionName": code,
            "Nodes": [{
                "Name": format!("{id}a"), "RegionID": id, "HostName": address,
                "IPv4": address, "IPv6": "none", "DERPPort": PORT, "STUNPort": STUN_PORT,
            }],
        })
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again after [`Derper::kill`].
    pub fn restart(&mut self, underlay: &Underlay) {
        self.restart_with(underlay, &[]);
    }

    /// Starts it again so that it answers STUN and relays nothing.
    pub fn restart_without_relay(&mut self, underlay: &Underlay) {
        self.restart_with(underlay, &["-derp=false"]);
    }

    fn restart_with(&mut self, underlay: &Underlay, flags: &[&str]) {
        let certificates = self.certificates.as_deref();
        self.process = spawn(underlay, self.address, certificates, &self.directory, flags);
        self.wait_until_it_answers(underlay);
    }

    fn wait_until_it_answers(&self, underlay: &Underlay) {
        eventually("derper answers", Duration::from_secs(10), || {
            let connect = || TcpStream::connect((self.address, PORT));
            underlay.router.run(connect).is_ok()
        });
    }
}

fn spawn(
    underlay: &Underlay,
    address: Ipv4Addr,
    certificates: Option<&str>,
    directory: &TempDir,
    flags: &[&str],
) -> Process {
    let mut command: Command = underlay.router.command(peer("derper"));
    command
        .args([format!("-a={address}:{PORT}"), "-http-port=-1".into()])
        .arg(format!("-stun-port={STUN_PORT}"))
        .arg("-c")
        .arg(directory.path().join("derper.json"))
        .args(flags);
    if let Some(certificates) = certificates {
        command
            .args(["-certmode=manual", &format!("-hostname={address}")])
            .arg(format!("-certdir={certificates}"));
    }
    Process::spawn(command, directory.path().join("test.log"))
}

impl Namespace {
    /// Lets no answer to STUN from this address in, so that the relay there seems far away.
    pub fn far_from(&self, relay: Ipv4Addr) {
        self.sh("nft add table ip far");
        self.sh("nft add chain ip far entering { type filter hook input priority 0 ; }");
        self.sh(&format!(
            "nft add rule ip far entering ip saddr {relay} meta l4proto udp drop"
        ));
    }
}
