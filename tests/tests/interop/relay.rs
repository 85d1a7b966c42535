use std::net::Ipv4Addr;

use tailnode_tests::Underlay;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("relay.udp-blocked", ALL, udp_blocked),
    ("relay.no-stun", ALL, no_stun),
    ("relay.path-lost", ALL, path_lost),
    ("relay.two-regions", ALL, two_regions),
    ("relay.restarted", ALL, restarted),
    ("relay.untrusted", ALL, untrusted),
    ("relay.home-lost", ALL, home_lost),
    ("relay.home-lost-both", &[T], home_lost_both),
    ("relay.home-vanished", &[C], home_vanished),
];

/// The relay of the first region, and that of the second.
const FIRST: Ipv4Addr = Underlay::ROUTER;
const OTHER: Ipv4Addr = Underlay::RELAY;

fn udp_blocked(server: Server) {
    let scene = Scene::new(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    relayed(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

/// No UDP passes at all, so that nobody tells the ends which relay is near.
fn no_stun(server: Server) {
    let scene = Scene::new(server);
    scene.underlay.block_udp();
    let machine = || scene.host_far_from(FIRST);
    let (web, gopher) = scene.pair(machine(), machine());
    relayed(&web, &gopher);
    same_bytes(&web, &gopher, 1_000_000);
}

/// A stream runs the whole time, and every byte of it is right.
fn path_lost(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    let streams = [
        flow(&web, &gopher, gopher.addresses[0], 8000),
        flow(&gopher, &web, web.addresses[0], 8001),
    ];
    scene.underlay.block_udp();
    arrives(&web, &gopher, gopher.addresses[0], 5);
    // Theirs trusts a path for 6.5 s.
    arrives(&gopher, &web, web.addresses[0], 5);
    // TCP itself tries again after 0.2 s, 0.4 s and so on: within as long as the path was lost.
    for stream in &streams {
        flows(stream, PATIENCE);
    }
    relayed(&web, &gopher);
    scene.underlay.unblock_udp();
    within(60, "the path is direct again", || {
        web.path_to("gopher") == "direct"
    });
    direct(&web, &gopher);
    for stream in streams {
        flows(&stream, PATIENCE);
        stream.finish();
    }
}

fn two_regions(server: Server) {
    for (ours, theirs) in [(FIRST, OTHER), (OTHER, FIRST)] {
        let scene = Scene::two_regions(server);
        scene.underlay.block_udp();
        let far = |home| if home == FIRST { OTHER } else { FIRST };
        let code = |home| if home == FIRST { scene.first() } else { SECOND };
        let (web, gopher) = scene.pair(
            scene.host_far_from(far(ours)),
            scene.host_far_from(far(theirs)),
        );
        within(PATIENCE, "each is at home in another region", || {
            web.home_relay() == code(ours) && gopher.home_relay() == code(theirs)
        });
        relayed(&web, &gopher);
        // Each end sends to where the other is at home.
        assert_eq!(web.relay_to("gopher"), code(theirs));
        let pong = gopher.ping_once(web.addresses[0]).unwrap();
        assert!(
            pong.contains(&format!("via DERP({})", code(ours))),
            "{pong}"
        );
        same_bytes(&web, &gopher, 1_000_000);
    }
}

fn restarted(server: Server) {
    let mut scene = Scene::new(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    relayed(&web, &gopher);
    scene.restart_relay();
    arrives(&web, &gopher, gopher.addresses[0], 30);
    arrives(&gopher, &web, web.addresses[0], 30);
    relayed(&web, &gopher);
}

fn untrusted(server: Server) {
    let scene = Scene::two_regions_one_untrusted(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host_far_from(FIRST), scene.host_far_from(OTHER));
    let told = |text: String| text.contains("no trusted TLS connection to 10.9.0.2");
    within(PATIENCE, "our status tells why", || {
        told(web.node()["health"].to_string()) && told(web.host.status_text())
    });
    assert!(told(web.host.log()), "the log does not tell why");
    // Nothing passes there, and all by the other region.
    relayed(&web, &gopher);
    within(PATIENCE, "our home is the other region", || {
        web.home_relay() == scene.first()
    });
    same_bytes(&web, &gopher, 1_000_000);
}

fn home_lost(server: Server) {
    let mut scene = Scene::two_regions(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host_far_from(FIRST), scene.host_far_from(OTHER));
    within(PATIENCE, "our home is the second region", || {
        web.home_relay() == SECOND
    });
    relayed(&web, &gopher);
    let mut relay = scene.relay.take().unwrap();
    relay.kill();
    relay.restart_without_relay(&scene.underlay);
    within(60, "our home is the first region", || {
        web.home_relay() == scene.first()
    });
    arrives(&gopher, &web, web.addresses[0], 30);
    arrives(&web, &gopher, gopher.addresses[0], 30);
    relayed(&web, &gopher);
    relay.kill();
    relay.restart(&scene.underlay);
    within(120, "our home is the second region again", || {
        web.home_relay() == SECOND
    });
    relayed(&web, &gopher);
}

/// Theirs stays at home where its relay answers STUN and nothing else; ours answers it all the same.
fn home_lost_both(server: Server) {
    let mut scene = Scene::two_regions(server);
    scene.underlay.block_udp();
    let machine = || scene.host_far_from(FIRST);
    let (web, gopher) = scene.pair(machine(), machine());
    within(PATIENCE, "both are at home in the second region", || {
        web.home_relay() == SECOND && gopher.home_relay() == SECOND
    });
    relayed(&web, &gopher);
    let relay = scene.relay.as_mut().unwrap();
    relay.kill();
    relay.restart_without_relay(&scene.underlay);
    within(60, "our home is the first region", || {
        web.home_relay() == scene.first()
    });
    arrives(&gopher, &web, web.addresses[0], 30);
    arrives(&web, &gopher, gopher.addresses[0], 30);
    same_bytes(&web, &gopher, 100_000);
}

/// Nothing tells that the relay is gone, but that it is silent.
fn home_vanished(server: Server) {
    let scene = Scene::two_regions(server);
    scene.underlay.block_udp();
    let (web, gopher) = scene.pair(scene.host_far_from(FIRST), scene.host_far_from(OTHER));
    within(PATIENCE, "our home is the second region", || {
        web.home_relay() == SECOND
    });
    relayed(&web, &gopher);
    scene.underlay.take_away(OTHER);
    within(90, "our home is the first region", || {
        web.home_relay() == scene.first()
    });
    arrives(&gopher, &web, web.addresses[0], 30);
    arrives(&web, &gopher, gopher.addresses[0], 30);
}
