// testcontrol serves the control server of Tailscale's own tests, whose tailnet has one relay.
// Everything is in memory, and everyone may reach everyone.
package main

import (
	"flag"
	"log"
	"net/http"
	"net/netip"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/dnstype"
)

func main() {
	listen := flag.String("listen", "", "IP:PORT of the control server")
	relay := flag.String("relay", "", "IP:PORT of the relay, which is told to nodes")
	stunPort := flag.Int("stun-port", 3478, "its STUN port")
	domain := flag.String("domain", "", "suffix of all names")
	authKey := flag.String("auth-key", "", "what nodes must know to join")
	flag.Parse()
	relayAt := netip.MustParseAddrPort(*relay)

	log.Fatal(http.ListenAndServe(*listen, administered(&testcontrol.Server{
		ExplicitBaseURL:  "http://" + *listen,
		RequireAuthKey:   *authKey,
		MagicDNSDomain:   *domain,
		AllNodesSameUser: true,
		AllOnline:        true,
		DefaultNodeCapabilities: &tailcfg.NodeCapMap{
			tailcfg.CapabilityTailnetLock: nil,
		},
		DNSConfig: &tailcfg.DNSConfig{
			Proxied: true,
			Domains: []string{*domain},
			Routes:  map[string][]*dnstype.Resolver{*domain: nil},
		},
		DERPMap: &tailcfg.DERPMap{Regions: map[int]*tailcfg.DERPRegion{1: {
			RegionID:   1,
			RegionCode: "test",
			Nodes: []*tailcfg.DERPNode{{
				Name:     "1a",
				RegionID: 1,
				HostName: relayAt.Addr().String(),
				IPv4:     relayAt.Addr().String(),
				IPv6:     "none",
				DERPPort: int(relayAt.Port()),
				STUNPort: *stunPort,
			}},
		}}},
	})))
}
