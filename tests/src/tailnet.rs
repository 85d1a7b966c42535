use std::{fs, net::TcpStream, process::Command, time::Duration};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    NameServer, Site, Underlay, eventually,
    program::{Process, program},
};

/// A coordination server, with its relay and STUN, on the underlay's router.
pub struct Tailnet {
    /// The DNS suffix of its nodes' names.
    pub domain: &'static str,
    port: u16,
    site: Site,
    // Goes before the directory that its log is in.
    process: Process,
    state: TempDir,
}

impl Tailnet {
    /// Starts one. On one underlay, ports must differ: the relay has `port`, STUN the next one.
    pub fn start(underlay: &Underlay, port: u16, domain: &'static str) -> Tailnet {
        Tailnet::start_as(underlay, port, domain, Site::default())
    }

    /// The same, with more than a bare server has.
    pub fn start_as(underlay: &Underlay, port: u16, domain: &'static str, site: Site) -> Tailnet {
        let state = TempDir::new().expect("a directory for the server's state");
        let process = spawn(underlay, port, domain, &site, &state);
        let tailnet = Tailnet {
            domain,
            port,
            site,
            state,
            process,
        };
        tailnet.wait_until_it_answers(underlay);
        tailnet
    }

    /// Ends the server. Its state stays.
    pub fn stop(&mut self) {
        self.process.terminate();
    }

    /// Starts it again after [`Tailnet::stop`].
    pub fn restart(&mut self, underlay: &Underlay) {
        self.process = spawn(underlay, self.port, self.domain, &self.site, &self.state);
        self.wait_until_it_answers(underlay);
    }

    /// The URL that nodes log in to.
    pub fn url(&self) -> String {
        url(&self.site, self.port)
    }

    /// Makes an auth key; `flags` as for `tailnode-control key create`.
    pub fn key(&self, flags: &[&str]) -> String {
        let output = self.control(&["key", "create"], flags);
        output.trim().to_owned()
    }

    /// Ends all auth keys.
    pub fn revoke_keys(&self) {
        for line in self.control(&["key", "list"], &[]).lines() {
            let id = line.split('\t').next().expect("a key's name");
            self.control(&["key", "expire"], &[id]);
        }
    }

    /// All nodes, as `tailnode-control node list --json` tells them.
    pub fn nodes(&self) -> Vec<Value> {
        let output = self.control(&["node", "list", "--json"], &[]);
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
    }

    /// The node of this name, if there is one.
    pub fn node(&self, name: &str) -> Option<Value> {
        self.nodes().into_iter().find(|node| {
            let full = node["name"].as_str().unwrap_or_default();
            full.split('.').next() == Some(name)
        })
    }

    /// Lets a node in whose login page has this URL.
    pub fn approve(&self, page: &str) {
        let id = page.rsplit('/').next().unwrap_or_default();
        self.control(&["node", "approve"], &[id]);
    }

    /// Makes a node log in again.
    pub fn expire(&self, name: &str) {
        self.control(&["node", "expire"], &[&self.id(name)]);
    }

    /// Forgets a node.
    pub fn delete(&self, name: &str) {
        self.control(&["node", "delete"], &[&self.id(name)]);
    }

    /// Calls a node otherwise.
    pub fn rename(&self, name: &str, new: &str) {
        self.control(&["node", "rename"], &[&self.id(name), new]);
    }

    fn id(&self, name: &str) -> String {
        let node = self.node(name);
        let node = node.unwrap_or_else(|| panic!("there is no node {name}"));
        node["id"].to_string()
    }

    /// Says who may reach whom from now on.
    pub fn set_policy(&self, policy: &str) {
        let file = self.state.path().join("policy.hujson");
        fs::write(&file, policy).expect("write the policy");
        self.control(&["policy", "set"], &[&file.to_string_lossy()]);
    }

    /// Lets the node of this name route these subnets from now on, and no others. It must offer them.
    pub fn set_routes(&self, name: &str, routes: &[&str]) {
        let offered = || {
            let node = self.node(name).unwrap_or_default();
            let offered = node["routes"].as_array().into_iter().flatten();
            let offered = offered.filter_map(|offer| offer["route"].as_str().map(str::to_owned));
            (node["id"].to_string(), offered.collect::<Vec<_>>())
        };
        eventually("the routes are offered", Duration::from_secs(10), || {
            let (_, offered) = offered();
            routes
                .iter()
                .all(|route| offered.iter().any(|offer| offer == route))
        });
        let (id, offered) = offered();
        let offered: Vec<_> = offered.iter().map(String::as_str).collect();
        let revoked = [&[&*id][..], &offered].concat();
        self.control(&["route", "revoke"], &revoked);
        if !routes.is_empty() {
            let approved = [&[&*id][..], routes].concat();
            self.control(&["route", "approve"], &approved);
        }
    }

    fn control(&self, words: &[&str], flags: &[&str]) -> String {
        let output = Command::new(program("tailnode-control"))
            .args(words)
            .arg("--state")
            .arg(self.state.path())
            .args(flags)
            .output()
            .expect("run tailnode-control");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "tailnode-control {words:?}: {errors}"
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn wait_until_it_answers(&self, underlay: &Underlay) {
        let address = (Underlay::ROUTER, self.port);
        eventually(
            "the coordination server answers",
            Duration::from_secs(10),
            || underlay.router.run(|| TcpStream::connect(address)).is_ok(),
        );
    }
}

fn spawn(underlay: &Underlay, port: u16, domain: &str, site: &Site, state: &TempDir) -> Process {
    let (zone, office) = (NameServer::OFFICE_ZONE, NameServer::OFFICE);
    let mut command = underlay.router.command(program("tailnode-control"));
    command
        .args(["serve", "--url", &url(site, port), "--domain", domain])
        .args(["--listen", &format!("{}:{port}", Underlay::ROUTER)])
        .args(["--stun", &format!("{}:{}", Underlay::ROUTER, port + 1)])
        .arg(format!("--record=wiki.{domain}={}", NameServer::WIKI))
        .arg(format!("--split-dns={zone}={office}"))
        .arg("--state")
        .arg(state.path());
    if let Some((cert, key)) = &site.https {
        command.arg("--tls-cert").arg(cert);
        command.arg("--tls-key").arg(key);
    }
    if !site.regions.is_empty() {
        let map = state.path().join("derp.json");
        fs::write(&map, site.derp_map().to_string()).expect("write the DERP map");
        command.arg("--derp-map").arg(map);
    }
    Process::spawn(command, state.path().join("test.log"))
}

fn url(site: &Site, port: u16) -> String {
    format!("{}://{}:{port}", site.scheme(), Underlay::ROUTER)
}
