use std::net::{IpAddr, Ipv4Addr};

use tailnode_tests::Underlay;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("wire.derper", ALL, derper),
    ("wire.stun", ALL, stun),
    ("wire.derp-tls", ALL, derp_tls),
    ("wire.netcheck", ALL, netcheck),
    ("wire.debug-derp", ALL, debug_derp),
    ("wire.status", WITH_KEYS, status),
];

/// Our node and theirs have the relay and STUN of Tailscale's derper, and no other.
fn derper(server: Server) {
    let scene = Scene::two_regions(server);
    scene.underlay.block_udp();
    let machine = || scene.host_far_from(Underlay::ROUTER);
    let (web, gopher) = scene.pair(machine(), machine());
    within(PATIENCE, "both are at home there", || {
        web.home_relay() == SECOND && gopher.home_relay() == SECOND
    });
    relayed(&web, &gopher);
    assert_eq!(web.relay_to("gopher"), SECOND);
    same_bytes(&web, &gopher, 1_000_000);
}

/// What STUN told our node of the way it is seen behind a NAT, their client learns.
fn stun(server: Server) {
    let scene = Scene::new(server);
    let (ours, theirs) = (scene.underlay.nat(), scene.underlay.nat());
    let (web, gopher) = scene.pair(ours.host(), theirs.host());
    // The first host of the underlay is the NAT that ours is behind.
    let outside = IpAddr::V4(Ipv4Addr::new(10, 9, 1, 2));
    within(PATIENCE, "theirs knows our outside", || {
        let endpoints = gopher.endpoints_of("web");
        endpoints.iter().any(|endpoint| endpoint.ip() == outside)
    });
    direct(&web, &gopher);
}

fn derp_tls(server: Server) {
    let scene = Scene::secure(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    relayed(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

fn netcheck(server: Server) {
    let scene = Scene::secure(server);
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    let report = gopher.netcheck();
    assert_eq!(report["UDP"], true, "{report}");
    let home = report["PreferredDERP"].to_string();
    assert_ne!(home, "0", "{report}");
    assert!(report["RegionLatency"][&home].is_number(), "{report}");
    // The address that STUN saw is its own: there is no NAT.
    let seen = report["GlobalV4"].as_str().unwrap_or_default();
    assert!(seen.starts_with("10.9.1.2:"), "{report}");
}

fn debug_derp(server: Server) {
    let scene = Scene::secure(server);
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    let report = gopher.debug_derp(scene.first());
    for words in [
        "Successfully established a DERP connection",
        "returned IPv4 STUN response: 10.9.1.2:",
    ] {
        assert!(report.contains(words), "not `{words}` but: {report}");
    }
}

fn status(server: Server) {
    let mut scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let web = scene.ours("web", &key, scene.host());
    let db = scene.ours("db", &key, scene.host());
    let other = scene.gopher("other", &key, scene.host());
    let gopher = scene.gopher("gopher", &key, scene.host());
    let sees = |name: &str, address: IpAddr| {
        let text = gopher.status_text();
        let mut lines = text.lines().map(str::split_whitespace);
        lines.any(|mut words| {
            words.next() == Some(&*address.to_string()) && words.next() == Some(name)
        })
    };
    let all = [
        ("web", web.addresses[0]),
        ("db", db.addresses[0]),
        ("other", other.addresses[0]),
        ("gopher", gopher.addresses[0]),
    ];
    for (name, address) in all {
        within(PATIENCE, &format!("{name} is seen"), || sees(name, address));
    }
    reach(&gopher, &web.addresses);
    scene.stop_server();
    scene.restart_server();
    for (name, address) in all {
        assert!(sees(name, address), "{name} is not seen after the restart");
    }
    reach(&gopher, &web.addresses);
    let late = scene.ours("late", &key, scene.host());
    within(60, "a new node is seen", || sees("late", late.addresses[0]));
    reach(&gopher, &late.addresses);
    reach(&late, &gopher.addresses);
}
